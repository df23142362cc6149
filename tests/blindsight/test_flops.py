"""Analytic FLOPs against the masks, and against torch's counter."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from blindsight.layouts import CATEGORIES, layouts, options, prompt
from capsight.blindsight import (
    BaseRule,
    Category,
    HeadMap,
    MaskOptions,
    attention_flops,
    prefill_flops,
    reference_mask,
    sparse_attention,
    visible_pairs,
)
from capsight.blindsight.calibrate.capture import watching
from capsight.layout import PromptLayout, build_layout
from tiny import FAMILIES


@settings(max_examples=40)
@given(
    layouts(),
    st.sampled_from(CATEGORIES),
    options(),
    st.builds(BaseRule, st.none() | st.integers(1, 12), st.booleans()),
)
def test_pairs_are_those_of_the_mask(layout, category, chosen, rule):
    assert visible_pairs(layout, category, chosen, rule) == int(
        reference_mask(layout, chosen, category, rule).sum()
    )


def counted(layout, categories, implementation):
    """FLOPs that torch counts for one call with D = 8."""
    q, k, v = (torch.randn(layout.batch_size, len(categories), layout.length, 8) for _ in range(3))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        sparse_attention(q, k, v, layout, categories, implementation=implementation)
    return counter.get_total_flops()


def test_the_counter_on_the_reference_path_and_on_segments():
    """The reference computes all S x S pairs; segments little more than the mask leaves."""
    layout = PromptLayout((prompt(*[200] * 8),))
    both = [Category.INTRA_IMAGE_SINK, Category.INTRA_IMAGE]
    s = layout.length
    assert counted(layout, both, "reference") == 4 * 8 * 2 * s * s
    exact = attention_flops(layout, HeadMap((tuple(both),)), head_dim=8)
    assert exact <= counted(layout, both, "segments") <= 3 * exact
    dense = attention_flops(layout, HeadMap.all_dense(1, 2), head_dim=8)
    assert dense == 4 * 8 * 2 * s * (s + 1) // 2
    assert exact < 0.3 * dense


@pytest.mark.parametrize("family", ["qwen2_5_vl", "internvl"])
def test_the_counter_on_a_whole_prefill(family):
    vlm = FAMILIES[family]()
    inputs = dict(vlm.inputs([([vlm.picture(0), vlm.picture(1)], "what is it")]))
    layout = build_layout(inputs, vlm.config)
    text = vlm.config.get_text_config()
    layers, heads = text.num_hidden_layers, text.num_attention_heads
    head_map = HeadMap.uniform(Category.INTRA_IMAGE, layers, heads)

    def observe(call):
        return sparse_attention(
            call.query, call.key, call.value, layout, [Category.DENSE] * heads, implementation="reference"
        )

    counter = FlopCounterMode(display=False, depth=8)
    with watching(vlm.model, observe), counter, sdpa_kernel(SDPBackend.MATH):
        vlm.model(**inputs, use_cache=False, logits_to_keep=1)
    counts = counter.get_flop_counts()
    ends = ("language_model", "lm_head")
    seen = sum(sum(ops.values()) for name, ops in counts.items() if name.endswith(ends))
    found = prefill_flops(vlm.model, layout, head_map)
    head_dim = text.hidden_size // heads
    pairs = layers * heads * layout.length**2
    assert seen == pytest.approx(found.linear + 4 * head_dim * pairs, rel=0.01)
    assert found.attention_dense == 4 * head_dim * layers * heads * layout.length * (layout.length + 1) // 2
    assert 0 < found.attention_saved < 1
    assert 0 < found.saved < found.attention_saved


def test_rules_of_gemma_are_counted():
    vlm = FAMILIES["gemma3"]()
    inputs = dict(vlm.inputs([([vlm.picture(0), vlm.picture(1)], "what is it")]))
    layout = build_layout(inputs, vlm.config)
    head_map = HeadMap.all_dense(4, 4)
    found = prefill_flops(vlm.model, layout, head_map)
    sliding, full = (
        visible_pairs(layout, Category.DENSE, MaskOptions(), BaseRule(window, True)) for window in (96, None)
    )
    assert sliding < full
    assert found.attention_dense == 4 * 16 * 4 * 2 * (sliding + full)
    assert found.attention_saved == 0
