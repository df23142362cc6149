"""Steps that read everything where it lies, against steps that line it up for torch, on tiny models."""

from __future__ import annotations

import pickle
from contextlib import nullcontext
from copy import deepcopy
from unittest import mock

import pytest
import torch

import capsight
from capsight.kvcapsule import KVCapsule
from capsight.kvcapsule.attention.native import missing
from capsight.kvcapsule.cache import layer, layer_tokens
from kvcapsule.conftest import fitted
from kvcapsule.test_generate import batch
from tiny import FAMILIES, TinyVLM

pytestmark = pytest.mark.skipif(bool(missing()), reason="no C++ compiler")
GREEDY = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True}
CODECS = [(codec, bits) for codec in ("heads", "evict") for bits in (None, 8, 4)]


@pytest.fixture(scope="module", params=["qwen2_5_vl", "llava_onevision"])
def vlm(request) -> TinyVLM:
    return FAMILIES[request.param]()


def capsule(vlm: TinyVLM, codec: str, bits: int | None) -> KVCapsule:
    made = fitted(vlm, 0.5, codec=codec)
    return made if bits is None else made.with_bits(bits)


def answers(vlm: TinyVLM, made: KVCapsule, inputs, native: bool, new: int, **options):
    """What the model writes after images were encapsulated, natively or not."""
    asked = mock.patch.object(layer_tokens, "supports", wraps=layer_tokens.supports)
    with capsight.enable(vlm.model, capsule=made, decode="latent") as fast, asked as able:
        if not native:
            able.side_effect = lambda query: False
        cache = fast.encapsulate(**inputs)
        found = fast.generate(
            past_key_values=cache, **inputs, max_new_tokens=new, min_new_tokens=new, **GREEDY, **options
        )
    assert able.called
    return found, cache


@pytest.mark.parametrize(("codec", "bits"), CODECS)
def test_native_steps_write_what_torch_writes(vlm, codec, bits):
    """Left-padded rows of two images, of one and of none, past the room that the tail has at first."""
    inputs, made = batch(vlm), capsule(vlm, codec, bits)
    (ours, cache), (theirs, other) = (answers(vlm, made, inputs, native, 20) for native in (True, False))
    assert cache.nbytes == other.nbytes
    for a, b in zip(ours.logits, theirs.logits, strict=True):
        torch.testing.assert_close(a, b, atol=2e-4, rtol=0)
    assert torch.equal(ours.sequences, theirs.sequences)


@pytest.mark.parametrize("vlm", ["llava_onevision"], indirect=True)
def test_a_copy_goes_its_own_way(vlm):
    """Tokens that are appended in place to a cache are not those of a copy of it."""
    inputs, made = batch(vlm), capsule(vlm, "heads", 8)
    with capsight.enable(vlm.model, capsule=made, decode="latent") as fast:
        cache = fast.encapsulate(**inputs)

        def go_on(cache, ids, new):
            more = ids.shape[1] - inputs["input_ids"].shape[1]
            mask = torch.nn.functional.pad(inputs["attention_mask"], (0, more), value=1)
            length = {"max_new_tokens": new, "min_new_tokens": new}
            return fast.generate(
                input_ids=ids, attention_mask=mask, past_key_values=cache, **length, **GREEDY
            )

        ids = fast.generate(
            past_key_values=cache, **inputs, max_new_tokens=3, min_new_tokens=3, **GREEDY
        ).sequences
        twin = deepcopy(cache)
        held, other = (next(iter(each.capsule_layers.values())) for each in (cache, twin))
        assert held._room.data_ptr() != other._room.data_ptr()
        before = held._tail.clone()
        first = go_on(twin, ids, 4)
        assert torch.equal(held._tail, before)
        second = go_on(cache, ids, 4)
        for a, b in zip(first.logits, second.logits, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


@pytest.mark.parametrize("codec", ["heads", "joint"])
@pytest.mark.parametrize("vlm", ["qwen2_5_vl"], indirect=True)
def test_all_layers_of_a_step_but_the_first_only_grow(vlm, codec):
    """What a step's first layer found is not looked into again, and the answers are the same."""
    inputs, made, found = batch(vlm), fitted(vlm, 0.5, codec=codec), []
    for grows in (True, False):
        asked = mock.patch.object(
            layer.CapsuleLayer, "update", autospec=True, side_effect=layer.CapsuleLayer.update
        )
        stuck = nullcontext() if grows else mock.patch.object(layer.CapsuleLayer, "grow", return_value=False)
        with capsight.enable(vlm.model, capsule=made) as fast, stuck:
            cache = fast.encapsulate(**inputs)
            with asked as updated:
                options = {"max_new_tokens": 9, "min_new_tokens": 9, **GREEDY}
                found.append(fast.generate(past_key_values=cache, **inputs, **options))
        layers = len(cache.capsule_layers)
        assert layers > 1
        found_calls = updated.call_count
        if (
            grows
        ):  # the question, the first step, which finds no tokens left before, and the first layer of others
            assert found_calls <= 3 * layers + 9
        else:
            assert found_calls >= 8 * layers
    assert all(map(torch.equal, found[0].logits, found[1].logits))


@pytest.mark.parametrize("vlm", ["qwen2_5_vl"], indirect=True)
def test_a_layer_that_was_left_before_is_not_when_it_may_not_be(vlm):
    """`update` by hand, in and out of `leaving_capsules` within one step."""
    inputs, made = batch(vlm), fitted(vlm, 0.5, codec="joint")
    with capsight.enable(vlm.model, capsule=made) as fast:
        cache = fast.encapsulate(**inputs)
    cache.honours_key_bias = True
    first, second, *_ = cache.capsule_layers
    rows, heads, size = len(inputs["input_ids"]), *cache.layers[first]._packed.shape[2:]

    def update(index):
        new = torch.randn(rows, heads, 1, size, generator=torch.Generator().manual_seed(index))
        keys, _ = cache.update(new, new, index)
        cache.take_latent()
        return keys.shape[2]

    with cache.leaving_capsules():
        for _ in range(2):
            assert [update(index) for index in cache.capsule_layers] == [1] * len(cache.capsule_layers)
        assert update(first) == 1
    assert update(second) == cache.layers[second].get_seq_length() > 1


@pytest.mark.parametrize("family", ["gemma3", "cohere2_vision"])
def test_a_step_that_begins_with_a_sliding_layer_looks_again_whose_attention_runs(family):
    """What the last step left to capsight's attention is not left to another one."""
    vlm = FAMILIES[family]()
    model, inputs = deepcopy(vlm.model), vlm.inputs([([vlm.picture(0)], "what do you see here?")])
    made = fitted(vlm, 0.5, codec="joint")
    model.set_attn_implementation({"text_config": "capsight"})
    cache = made.cache(inputs, model.config)
    cache.lean = True
    assert not isinstance(cache.layers[0], layer.CapsuleLayer)
    ids = model.generate(**inputs, past_key_values=cache, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    model.set_attn_implementation({"text_config": "sdpa"})
    more = ids.shape[1] - inputs["input_ids"].shape[1]
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, more), value=1)
    grows = mock.patch.object(layer.CapsuleLayer, "grow", side_effect=AssertionError("left to SDPA"))
    with torch.no_grad(), grows:
        step = model(input_ids=ids[:, -1:], attention_mask=mask, past_key_values=cache)
    assert step.logits.isfinite().all()


@pytest.mark.parametrize("vlm", ["qwen2_5_vl"], indirect=True)
def test_room_for_more_tokens_is_made_by_the_first_and_not_copied(vlm):
    inputs = batch(vlm)
    with capsight.enable(vlm.model, capsule=fitted(vlm, 0.5, codec="joint")) as fast:
        cache = fast.encapsulate(**inputs)
        assert all(held._room.shape[2] == held._held for held in cache.capsule_layers.values())
        fast.generate(past_key_values=cache, **inputs, max_new_tokens=2, min_new_tokens=2, do_sample=False)
    first, *_ = cache.capsule_layers.values()
    assert first._room.shape[2] > first._held
    for copied in (deepcopy(cache), pickle.loads(pickle.dumps(cache))):
        other, *_ = copied.capsule_layers.values()
        assert other._room.shape[2] == first._held == other._held
        assert torch.equal(other._tail, first._tail)


def test_the_tail_is_appended_to_in_place():
    made = layer.CapsuleLayer.__new__(layer.CapsuleLayer)
    made._tail = torch.zeros(2, 3, 0, 2, 4)
    new, places = torch.randn(2, 3, 2, 40, 4), set()
    for start in range(40):
        made._append(*new[:, :, :, start : start + 1])
        assert torch.equal(made._tail, new[:, :, :, : start + 1].transpose(2, 3))
        places.add(made._room.data_ptr())
    assert len(places) <= 3
    with torch.inference_mode():
        made._tail = torch.zeros(2, 3, 0, 2, 4)
        made._append(*new[..., :1, :])
    made._append(*new[..., 1:2, :])  # outside of it, where its buffers may not be written
    assert torch.equal(made._tail, new[:, :, :, :2].transpose(2, 3))
