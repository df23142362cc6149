"""Models with states beside keys and values: bytes, beams, cropping, saving."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import capsight
from capsight.errors import CapsightError, CapsuleFileError
from kvcapsule.conftest import fitted
from kvcapsule.test_generate import assert_same, batch, full_cache, run
from tiny import FAMILIES, TinyVLM

HYBRID = ["qwen3_5", "qwen3_5_moe", "minicpmv4_6", "lfm3_vl"]


@pytest.fixture(params=HYBRID)
def hybrid(request: pytest.FixtureRequest) -> TinyVLM:
    return FAMILIES[request.param]()


def ask(fast: Any, inputs: Any) -> Any:
    options = {"max_new_tokens": 6, "do_sample": False, "output_logits": True}
    return fast.generate(past_key_values=fast.cache, **inputs, **options, return_dict_in_generate=True)


def states_of(layers: Any) -> int:
    """Bytes of all states, counted by hand."""
    found = 0
    for layer in layers:
        for held in (getattr(layer, "conv_states", {}), getattr(layer, "recurrent_states", {})):
            found += sum(x.numel() * x.element_size() for x in held.values() if x is not None)
    return found


def test_states_are_counted_apart_from_keys_and_values(hybrid):
    inputs, full = batch(hybrid), full_cache(hybrid)
    cache = fitted(hybrid, 0.4).cache(inputs)
    run(hybrid, inputs, full)
    run(hybrid, inputs, cache)
    states = states_of(full.layers)
    assert cache.state_nbytes == states == states_of(cache.layers) > 0
    assert cache.nbytes < cache.nbytes_full
    cache.keep_states()
    assert cache.state_nbytes == 2 * states
    kv = [layer.keys.nbytes + layer.values.nbytes for layer in full.layers if hasattr(layer, "keys")]
    pads = sum(row.pad_left for row in cache.layout.rows) / cache.layout.batch_size / cache.get_seq_length()
    if not any(getattr(layer, "is_sliding", False) for layer in cache.layers):  # these hold padding
        assert cache.nbytes_full == pytest.approx(sum(kv) * (1 - pads) + states)
    assert sum(cache.layer_nbytes) <= cache.nbytes


def test_beams_and_several_sequences(hybrid):
    inputs, capsule = batch(hybrid), fitted(hybrid, 1.0)
    for options in ({"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}):
        a = run(hybrid, inputs, full_cache(hybrid), **options)
        assert torch.equal(a.sequences, run(hybrid, inputs, capsule.cache(inputs), **options).sequences)


def test_rows_of_the_kept_states_move_with_the_cache(hybrid):
    inputs = batch(hybrid)
    with capsight.enable(hybrid.model, capsule=fitted(hybrid, 1.0)) as fast:
        fast.encapsulate(**inputs)
        cache, length = fast.cache, fast.cache.get_seq_length()
        first = [s.clone() for layer in cache.layers for s in getattr(layer, "conv_states", {}).values()]
        cache.batch_select_indices(torch.tensor([2, 0]))
        picked = {k: v[[2, 0]] for k, v in inputs.items() if len(v) == 3 and v.ndim == 2}
        tokens = {k: v for k, v in picked.items() if k in ("input_ids", "attention_mask")}
        fast.generate(past_key_values=cache, **tokens, max_new_tokens=3)
        cache.crop(length)
    moved = [s for layer in cache.layers for s in getattr(layer, "conv_states", {}).values()]
    assert all(torch.equal(a[[2, 0]], b) for a, b in zip(first, moved, strict=True))


def test_crop_comes_back_to_the_images_and_to_no_other_length(hybrid):
    inputs = batch(hybrid)
    expected = run(hybrid, inputs, full_cache(hybrid))
    with capsight.enable(hybrid.model, capsule=fitted(hybrid, 1.0)) as fast:
        cache = fast.encapsulate(**inputs)
        length = cache.get_seq_length()
        for _ in range(3):
            fast.cache = cache
            assert_same(ask(fast, inputs), expected)
            after = cache.get_seq_length()
            with pytest.raises(CapsightError, match=f"cannot crop to {length + 1} tokens.*those of {length}"):
                cache.crop(length + 1)
            assert cache.get_seq_length() == after
            cache.crop(length)
        cache.reset()
        assert cache.kept_states is None


def test_without_kept_states_nothing_is_cropped(hybrid):
    inputs = batch(hybrid)
    cache = fitted(hybrid, 0.4).cache(inputs)
    run(hybrid, inputs, cache)
    with pytest.raises(CapsightError, match="none were"):
        cache.crop(-1)
    cache.crop(cache.get_seq_length())  # removes nothing


def test_saved_states(hybrid, tmp_path):
    inputs, capsule = batch(hybrid), fitted(hybrid, 0.4)
    with capsight.enable(hybrid.model, capsule=capsule) as fast:
        fast.encapsulate(**inputs)
        fast.save(tmp_path / "images")
        expected = ask(fast, inputs)
        fast.save(tmp_path / "later")
    with capsight.enable(hybrid.model, capsule=capsule) as fast:
        cache = fast.load(tmp_path / "images")
        length = cache.get_seq_length()
        for _ in range(2):
            fast.cache = cache
            assert_same(ask(fast, inputs), expected)
            cache.crop(length)
        later = fast.load(tmp_path / "later")
        assert later.kept_states is None
        with pytest.raises(CapsightError, match="cannot crop"):
            later.crop(-1)


def test_a_saved_cache_without_a_state_is_refused(hybrid, tmp_path):
    from capsight.kvcapsule.cache_parts import deserialize, serialize

    inputs, capsule = batch(hybrid), fitted(hybrid, 0.4)
    cache = capsule.cache(inputs)
    run(hybrid, inputs, cache)
    devices = dict.fromkeys(range(4), torch.device("cpu"))
    for name in [name for name in serialize(cache)[1] if name.startswith("layers.0.")]:
        header, tensors = serialize(cache)
        tensors[name] = tensors[name][:1]
        with pytest.raises(CapsuleFileError, match=name):
            deserialize(header, tensors, capsule, hybrid.config, devices)
        header, tensors = serialize(cache)
        del tensors[name]
        with pytest.raises(CapsuleFileError, match=name):
            deserialize(header, tensors, capsule, hybrid.config, devices)


@pytest.mark.parametrize("name", ["gemma3", "gemma4"])
def test_full_windows_go_back_to_the_kept_length_only(name, tmp_path):
    vlm = FAMILIES[name]()
    inputs, capsule = batch(vlm), fitted(vlm, 1.0)
    expected = run(vlm, inputs, full_cache(vlm))
    with capsight.enable(vlm.model, capsule=capsule) as fast:
        cache = fast.encapsulate(**inputs)
        length, before = cache.get_seq_length(), cache.nbytes
        assert length > max(layer.sliding_window for layer in cache.layers if layer.is_sliding)
        fast.save(tmp_path / "images")
        cache.crop(length)  # nothing to remove
        for held in (cache, cache, fast.load(tmp_path / "images")):
            fast.cache = held
            assert_same(ask(fast, inputs), expected)
            assert held.nbytes > before  # the old window is counted while it is kept beside the new one
            with pytest.raises(CapsightError, match="full sliding windows go back only"):
                held.crop(-1)
            held.crop(length)
            assert held.nbytes == before
    alone = capsule.cache(inputs)
    run(vlm, inputs, alone)
    with pytest.raises(CapsightError, match="none were"):
        alone.crop(-1)
