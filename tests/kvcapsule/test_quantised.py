"""Capsules in few bits: bytes, errors, files, and a model that runs on them."""

from __future__ import annotations

import pytest
import torch

from capsight.errors import CapsuleFileError, OptionError
from capsight.kvcapsule import KVCapsule
from capsight.kvcapsule.codecs import CODECS, QuantisedCodec
from kvcapsule.conftest import BLOCK, blocks, codec, fitted, runs
from kvcapsule.test_generate import batch, full_cache, run
from kvcapsule.test_store import edit_header
from tiny import CACHES, in_turn

NAMES = sorted(CODECS)
RUNS = runs(5)


def pair(count: int = 5, size: int = 8, head_dim: int = 4):
    return blocks(count, 2, size, head_dim, 7), blocks(count, 2, size, head_dim, 8)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [4, 5])
def test_bytes_by_hand_select_and_join(name, bits, dtype, head_dim):
    keys, values = (x.to(dtype) for x in pair(head_dim=head_dim))
    quantised = QuantisedCodec(codec(name, 3, head_dim=head_dim), bits)
    payload = quantised.encode_runs(keys, values, RUNS)
    channels = head_dim if bits == 8 else (head_dim + 1) // 2
    levels = 2 * 3 * 2 * channels  # keys and values of 3 tokens and 2 heads
    groups = 3 * 2 if name == "heads" else 2 * head_dim  # of keys: per token and head, or per channel
    scales = 2 * (groups + 3 * 2) * dtype.itemsize  # step and low of these, and of values per token and head
    positions = {"adaptive": 3, "evict": 3, "heads": 2 * (3 + 1)}.get(name, 0)
    assert payload.nbytes == 5 * (levels + scales + positions)
    assert payload.nbytes == 5 * quantised.payload_nbytes(2, head_dim, dtype.itemsize)
    index = torch.tensor([3, 0])
    for found, whole in zip(quantised.decode(payload.select(index)), quantised.decode(payload), strict=True):
        assert found.dtype == dtype
        torch.testing.assert_close(found, whole[index])
    both = payload.select(index[:1]).join(payload.select(index[1:]))
    assert all(torch.equal(t, payload.select(index).tensors[name]) for name, t in both.tensors.items())
    assert quantised.module_nbytes == quantised.inner.module_nbytes


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bits", [8, 4])
def test_what_is_rebuilt_is_what_the_inner_codec_rebuilds_from_rounded_numbers(name, bits):
    keys, values = pair()
    inner = codec(name, 5)
    quantised = QuantisedCodec(inner, bits)
    payload, exact = quantised.encode_runs(keys, values, RUNS), inner.encode(keys, values)
    opened = quantised.opened(payload)
    assert set(opened.tensors) == set(exact.tensors)
    for kind, axis in (("keys", 1), ("values", 3), ("latent", 3)):
        if kind in exact.tensors:
            x, found = exact.tensors[kind], opened.tensors[kind]
            if name == "heads":  # per token, keys in units of what is usual
                axis = 1
                centre, size = inner.typical_keys(exact)
                if kind == "keys":
                    x, found = (x - centre) / size, (found - centre) / size
            step = (x.amax(axis, keepdim=True) - x.amin(axis, keepdim=True)) / (2**bits - 1)
            assert ((found - x).abs() <= step / 2 + 1e-5).all()
    for found, expected in zip(quantised.decode(payload), inner.decode(opened), strict=True):
        assert torch.equal(found, expected)
    bias, expected = quantised.bias(payload), inner.bias(exact)
    assert (bias is None) == (expected is None)
    assert bias is None or torch.equal(bias, expected)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bits", [8, 4])
def test_no_blocks_and_several_layers_at_once(name, bits):
    keys, values = pair()
    codecs = [
        QuantisedCodec(codec(name, 3, joint=j), bits)
        for j in ((True, False) if name in ("adaptive", "evict", "heads") else ())
    ]
    codecs = codecs or [QuantisedCodec(codec(name, 3), bits)]
    together = QuantisedCodec.encode_layers(codecs, [keys] * len(codecs), [values] * len(codecs), RUNS)
    for one, payload in zip(codecs, together, strict=True):
        alone = one.encode_runs(keys, values, RUNS).tensors
        assert all(torch.equal(tensor, alone[key]) for key, tensor in payload.tensors.items())
        none = torch.empty(0, dtype=torch.int64)
        assert one.decode(payload.select(none))[0].shape == (0, 2, 8, 4)


def test_bits_of_a_capsule_its_name_and_its_file(qwen, tmp_path):
    capsule = fitted(qwen)
    few = capsule.with_bits(4)
    assert (capsule.name, few.name, few.with_bits(None).name) == ("adaptive", "adaptive-int4", "adaptive")
    assert few.codecs[0].packed is capsule.codecs[0].packed
    assert few.with_retained(0.5).info.bits == few.with_codec("evict").info.bits == 4
    assert few.module_nbytes == capsule.module_nbytes
    assert few.break_even_tokens(batch=1) <= capsule.break_even_tokens(batch=1)
    assert fitted(qwen, 1.0).break_even_tokens() is None
    assert fitted(qwen, 1.0).with_bits(8).break_even_tokens() > 0
    few.save_pretrained(tmp_path)
    again = KVCapsule.from_pretrained(tmp_path)
    assert again.info == few.info
    assert all(isinstance(codec, QuantisedCodec) for codec in again.stored.values())
    for bits in (2, 3, 16, 0):
        with pytest.raises(OptionError, match="8 or 4"):
            capsule.with_bits(bits)
    for bits in (2, "8", True, 8.0, []):
        edit_header(tmp_path, bits=bits)
        with pytest.raises(CapsuleFileError, match="bits"):
            KVCapsule.from_pretrained(tmp_path)


@in_turn("codec", ["adaptive", "heads"], CACHES)
def test_eight_bits_of_everything_are_close_to_the_full_cache(vlm, codec):
    inputs, options = batch(vlm), {"min_new_tokens": 3, "max_new_tokens": 3}
    full = run(vlm, inputs, full_cache(vlm), **options)
    apart, sizes = [], []
    for bits in (None, 8, 4):
        cache = fitted(vlm, 1.0, codec=codec).with_bits(bits).cache(inputs)
        found = run(vlm, inputs, cache, **options)
        same = (found.sequences == full.sequences).all(1)
        apart.append((found.logits[1] - full.logits[1])[same].norm() / full.logits[1][same].norm())
        sizes.append(cache.nbytes)
    assert apart[0] < 1e-4
    assert apart[0] < apart[1] < 0.02
    assert apart[1] < apart[2]
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize("bits", [8, 4])
def test_bytes_of_a_cache_are_counted_to_the_last_scale(qwen, bits):
    inputs = batch(qwen)
    capsule = fitted(qwen, 0.4).with_bits(bits)
    cache, exact = capsule.cache(inputs), fitted(qwen, 0.4).cache(inputs)
    for used in (cache, exact):
        with torch.no_grad():
            qwen.model(**inputs, past_key_values=used, use_cache=True)
    kept, runs = round(0.4 * BLOCK), len(cache.capsule_layers[0].placement.runs)
    numbers = 2 * kept * 2 * 16  # of a run in a layer
    saved = numbers * 4 - numbers * bits // 8 - 2 * 2 * (16 + kept) * 4
    assert exact.nbytes - cache.nbytes == 3 * runs * saved
