"""KV bytes against the caches that real tiny models fill."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import DynamicCache

import capsight
from capsight.kvcapsule import KVCapsule
from capsight.kvcapsule.cache.stock import stock_nbytes
from capsight.layout import build_layout
from capsight.planning import ModelShape
from capsight.planning.cache import (
    capsule_kv_bytes,
    full_kv_bytes,
    planned_capsule,
    scratch_bytes,
    state_bytes,
)
from tiny import FAMILIES, TinyVLM, in_turn

BLOCK, NEW = 16, 3


@pytest.fixture(params=sorted(FAMILIES))
def vlm(request: pytest.FixtureRequest) -> TinyVLM:
    return FAMILIES[request.param]()


def prompt(tiny: TinyVLM):
    return tiny.inputs([([tiny.picture(0), tiny.picture(1)], "what is the difference?")])


def fill(model, cache, inputs):
    """Prefill, then `NEW` tokens."""
    model.generate(
        **inputs, past_key_values=cache, max_new_tokens=NEW + 1, min_new_tokens=NEW + 1, do_sample=False
    )
    return cache


def stored(cache) -> int:
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers if hasattr(layer, "keys"))


def test_full_cache(vlm):
    inputs, shape = prompt(vlm), ModelShape.of(vlm.config)
    length = inputs["input_ids"].shape[1]
    cache = fill(vlm.model, DynamicCache(config=vlm.config), inputs)
    assert full_kv_bytes(shape, length + NEW, itemsize=4) == stored(cache)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["qwen3_5", "lfm2_vl"])
def test_states(name, dtype):
    vlm = FAMILIES[name]()
    model = copy.deepcopy(vlm.model).to(dtype)
    cache = fill(model, DynamicCache(config=vlm.config), prompt(vlm))
    real = sum(stock_nbytes(layer) for layer in cache.layers) - stored(cache)
    assert state_bytes(ModelShape.of(vlm.config), dtype.itemsize) == real > 0


def test_sliding_layers_hold_less_than_full_ones():
    gemma = FAMILIES["gemma3"]()
    shape = ModelShape.of(gemma.config)
    assert [layer.window for layer in shape.layers] == [96, None, 96, None]
    assert full_kv_bytes(shape, 500, 2) == 2 * 2 * 2 * (95 + 500) * 2 * 16


def test_grouped_queries_store_kv_heads_only(vlm):
    layer = next(layer for layer in ModelShape.of(vlm.config).layers if layer.kv_heads)
    assert (layer.query_heads, layer.kv_heads, layer.head_dim) == (4, 2, 16)


@in_turn("retained", [1.0, 0.4, 0.1], sorted(FAMILIES))
def test_capsule_cache(vlm, retained):
    inputs, shape = prompt(vlm), ModelShape.of(vlm.config)
    fitted = KVCapsule.fit(vlm.model, vlm.processor, [inputs], retained, "heads", BLOCK, progress=False)
    planned, layout = planned_capsule(shape, retained, 4, BLOCK, "heads"), build_layout(inputs, vlm.config)
    scratch = {}
    for decode in ("latent", "materialise"):
        with capsight.enable(vlm.model, capsule=fitted, decode=decode) as fast:
            fill(fast, None, inputs)
        assert capsule_kv_bytes(shape, layout, NEW, 4, planned) == fast.cache.nbytes - fast.cache.state_nbytes
        assert planned.module_nbytes == fitted.module_nbytes == fast.cache.module_nbytes
        scratch[decode] = next(iter(fast.cache.capsule_layers.values()))._ledger.scratch.nbytes
    for batch in (1, 4):
        assert planned.break_even_tokens(batch) == fitted.break_even_tokens(batch)
    planned_scratch = scratch_bytes(shape, layout.length + NEW, 4)
    assert scratch["latent"] < scratch["materialise"] <= planned_scratch <= scratch["materialise"] * 1.3


def test_batch_of_left_padded_rows(vlm):
    inputs = vlm.inputs([([vlm.picture(0)], "hi"), ([vlm.picture(1)], "what is there to see?")])
    shape = ModelShape.of(vlm.config)
    fitted = KVCapsule.fit(vlm.model, vlm.processor, [inputs], 0.4, "heads", BLOCK, progress=False)
    cache = fitted.cache(inputs)
    with torch.no_grad():
        vlm.model(**inputs, past_key_values=cache, use_cache=True)
    layout = build_layout(inputs, vlm.config)
    planned = planned_capsule(shape, 0.4, 4, BLOCK, "heads")
    assert capsule_kv_bytes(shape, layout, 0, 4, planned) == cache.nbytes - cache.state_nbytes


@in_turn("retained", [1.0, 0.5], sorted(FAMILIES))
def test_joint_capsules_take_no_more_than_planned(vlm, retained):
    inputs, shape = prompt(vlm), ModelShape.of(vlm.config)
    fitted = KVCapsule.fit(vlm.model, vlm.processor, [inputs], retained, "joint", progress=False)
    planned, layout = planned_capsule(shape, retained, 4), build_layout(inputs, vlm.config)
    assert planned.module_nbytes >= fitted.module_nbytes
    with capsight.enable(vlm.model, capsule=fitted) as fast:
        fill(fast, None, inputs)
    real = fast.cache.nbytes - fast.cache.state_nbytes
    most = capsule_kv_bytes(shape, layout, NEW, 4, planned)
    assert real <= most
    assert retained < 1 or real == most
    assert most - real <= layout.length * fitted.codecs[next(iter(fitted.codecs))].full_nbytes * 0.25
