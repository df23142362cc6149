from __future__ import annotations

import pytest
import torch

import capsight
from capsight.blindsight import Category, HeadMap, MaskOptions, sparse_attention
from capsight.blindsight.attention import choice
from capsight.blindsight.calibrate.capture import watching
from capsight.errors import ModelMismatchError, OptionError
from capsight.layout import build_layout
from tiny import in_turn

from .conftest import few, fitted
from .test_enable import assert_same, greedy, mixed_batch


def size_of(vlm):
    text = vlm.config.get_text_config()
    return text.num_hidden_layers, text.num_attention_heads


@few
def test_all_dense_map_is_the_untouched_model(vlm):
    inputs = mixed_batch(vlm)
    full = greedy(vlm.model.generate, **inputs)
    with capsight.enable(vlm.model, head_map=HeadMap.all_dense(*size_of(vlm))) as fast:
        ours = greedy(fast.generate, **inputs)
    assert torch.equal(ours.sequences, full.sequences)
    assert all(torch.equal(a, b) for a, b in zip(ours.logits, full.logits, strict=True))


@in_turn("category", [Category.SINK, Category.INTRA_IMAGE_SINK])
def test_sparse_map_changes_only_rows_with_several_images(vlm, category):
    inputs = mixed_batch(vlm)
    full = greedy(vlm.model.generate, **inputs)
    with capsight.enable(
        vlm.model, head_map=HeadMap.uniform(category, *size_of(vlm)), prefill="sparse"
    ) as fast:
        ours = greedy(fast.generate, **inputs)
    change = (ours.logits[0] - full.logits[0]).abs().amax(-1)
    assert change[0] > 1e-5
    assert change[2] <= 1e-4
    if category is Category.INTRA_IMAGE_SINK:
        assert change[1] <= 1e-4 or vlm.name in ("internvl", "llava_onevision", "smolvlm", "idefics3")


@few
def test_a_model_follows_the_reference_masks(vlm):
    """A whole model under a map of all categories, against attention by the written-out masks."""
    inputs = mixed_batch(vlm)
    layout, (layers, heads) = build_layout(inputs, vlm.config), size_of(vlm)
    each, rest = divmod(layers * heads, 4)
    counts = dict.fromkeys(Category, each) | {Category.DENSE: each + rest}
    head_map = HeadMap.random(layers, heads, counts, seed=1, options=MaskOptions(own_window=3))

    def oracle(call):
        categories = head_map.categories[call.layer]
        given = {"options": head_map.options, "rule": call.rule, "scaling": call.scaling}
        return sparse_attention(
            call.query, call.key, call.value, layout, categories, implementation="reference", **given
        )

    with watching(vlm.model, oracle):
        expected = vlm.model(**inputs, use_cache=False, logits_to_keep=1).logits[:, -1]
    with capsight.enable(vlm.model, head_map=head_map, prefill="sparse") as fast:
        found = greedy(fast.generate, **inputs).logits[0]
    assert (found - expected).abs().max() <= 1e-4


def test_with_capsules_and_encapsulated(qwen):
    inputs = mixed_batch(qwen)
    head_map = HeadMap.uniform(Category.INTRA_IMAGE, *size_of(qwen))
    with capsight.enable(qwen.model, head_map=head_map, prefill="sparse") as fast:
        alone = greedy(fast.generate, **inputs)
    with capsight.enable(
        qwen.model, head_map=head_map, prefill="sparse", capsule=fitted("qwen2_5_vl", 1.0)
    ) as fast:
        assert_same(greedy(fast.generate, **inputs), alone)
        cache = fast.encapsulate(**inputs)
        assert_same(greedy(fast.generate, past_key_values=cache, **inputs), alone)


def test_auto_leaves_the_mask_out_where_it_cannot_win(qwen, monkeypatch):
    """A prompt that is shorter than the table's entry is read by the model's own attention, bit for bit."""
    inputs = mixed_batch(qwen)
    length, head_map = inputs["input_ids"].shape[1], HeadMap.uniform(Category.SINK, *size_of(qwen))
    full = greedy(qwen.model.generate, **inputs)
    with capsight.enable(qwen.model, head_map=head_map, prefill="sparse") as fast:
        sparse = greedy(fast.generate, **inputs)
    assert not torch.equal(sparse.logits[0], full.logits[0])
    for first, expected in ((length + 1, full), (length, sparse)):
        table = {"cpu": {"float32": first}}
        monkeypatch.setattr(choice, "_measured", lambda table=table: {"mask_from": table, "table": {}})
        monkeypatch.setattr(choice, "device_name", lambda device: device.type)
        with capsight.enable(qwen.model, head_map=head_map) as fast:
            found = greedy(fast.generate, **inputs)
        assert all(torch.equal(a, b) for a, b in zip(found.logits, expected.logits, strict=True))


def test_a_store_and_unknown_ways_to_prefill(qwen, tmp_path):
    """Stored images may become part of a longer prompt, so they follow the head map at any length."""
    head_map, capsule = HeadMap.all_dense(*size_of(qwen)), fitted("qwen2_5_vl", 0.1, "joint")
    store = capsight.CapsuleStore(tmp_path)
    with capsight.enable(qwen.model, head_map=head_map, capsule=capsule, store=store) as fast:
        assert fast.prefill == "sparse"
    with pytest.raises(OptionError, match="prefill"), capsight.enable(qwen.model, prefill="dense"):
        pass


def test_beams(qwen):
    inputs = mixed_batch(qwen)
    options = {"max_new_tokens": 4, "num_beams": 2, "do_sample": False}
    full = qwen.model.generate(**inputs, **options)
    with capsight.enable(qwen.model, head_map=HeadMap.all_dense(*size_of(qwen))) as fast:
        assert torch.equal(fast.generate(**inputs, **options), full)


def test_map_of_another_model_is_refused(qwen):
    layers, heads = size_of(qwen)
    for head_map in (
        HeadMap.all_dense(layers + 1, heads),
        HeadMap.all_dense(layers, heads).for_model("other"),
    ):
        with (
            pytest.raises(ModelMismatchError),
            capsight.enable(qwen.model, head_map=head_map, prefill="sparse"),
        ):
            pass
