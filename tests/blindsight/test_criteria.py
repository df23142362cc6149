"""What a head loses by a category, against transformers' own attention weights and layers."""

import pytest
import torch

from capsight.blindsight import Category, MaskOptions, reference_mask
from capsight.blindsight.calibrate.capture import watching
from capsight.blindsight.calibrate.criteria import distribution, later_rows, mass, output
from capsight.blindsight.categories import SPARSE
from capsight.blindsight.flops import layer_rules
from capsight.layout import build_layout
from tiny import FAMILIES

DENSE = Category.DENSE
OPTIONS = MaskOptions(own_window=4)


@pytest.fixture(scope="module")
def vlm():
    return FAMILIES["qwen2_5_vl"]()


def sample(vlm, seed=0, images=2):
    return dict(vlm.inputs([([vlm.picture(seed + i) for i in range(images)], f"what is it {seed}")]))


@pytest.fixture(scope="module")
def samples(vlm):
    return [sample(vlm, seed) for seed in range(4)]


def eager_weights(vlm, inputs):
    """Attention weights as transformers itself computes them: per layer `[B, Hq, S, S]`."""
    before = vlm.config.get_text_config()._attn_implementation
    vlm.model.set_attn_implementation({"text_config": "eager"})
    try:
        with torch.no_grad():
            return vlm.model(**inputs, use_cache=False, output_attentions=True).attentions
    finally:
        vlm.model.set_attn_implementation({"text_config": before})


@pytest.mark.parametrize("family", ["qwen2_5_vl", "gemma3"])
def test_mass_is_what_the_masks_cut_off(family):
    vlm = FAMILIES[family]()
    inputs = sample(vlm, images=3)
    layout = build_layout(inputs, vlm.config)
    found = mass(vlm.model, inputs, layout, OPTIONS)
    rows, rules = later_rows(layout.rows[0]), layer_rules(vlm.config, len(found))
    for layer, weights in enumerate(eager_weights(vlm, inputs)):
        for index, category in enumerate(SPARSE):
            hidden = ~reference_mask(layout, OPTIONS, category, rules[layer])[0]
            expected = (weights[0] * hidden)[:, rows].sum(-1).mean(-1)
            assert torch.allclose(found[layer, index], expected, atol=1e-5)


def test_output_is_the_change_through_w_o(vlm, samples):
    layout = build_layout(samples[0], vlm.config)
    found = output(vlm.model, samples[0], layout, OPTIONS)
    rows = later_rows(layout.rows[0])
    layer, head = 1, 2
    seen = {}

    def observe(call):
        out = call.attend_uniform(layout, DENSE, OPTIONS)
        if call.layer == layer:
            for category in SPARSE:
                one = tuple(category if h == head else DENSE for h in range(4))
                seen[category] = (call.module.o_proj, out, call.attend(layout, one, OPTIONS))
        return out

    with watching(vlm.model, observe):
        vlm.model(**samples[0], use_cache=False)
        for index, category in enumerate(SPARSE):
            project, *outs = seen[category]
            a, b = (project(out.transpose(1, 2).flatten(2))[0, rows] for out in outs)
            assert torch.allclose(found[layer, index, head], (a - b).norm() / a.norm(), atol=1e-4)


def test_distribution_is_zero_only_where_nothing_is_lost(vlm, samples):
    layout = build_layout(samples[0], vlm.config)
    found = distribution(vlm.model, samples[0], layout, MaskOptions(own_window=4))
    assert found.shape == (3, 3, 4)
    assert (found > -1e-6).all()
    assert found[0].max() > 1e-7
    assert found[-1].abs().max() < 1e-5  # the last layer's image rows reach no later token
