"""Kept tokens shared out over the blocks of a prompt, against plain loops over blocks and tokens."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from capsight.errors import CapsuleFileError, OptionError
from capsight.kvcapsule import KVCapsule
from capsight.kvcapsule.codecs import Payload, QuantisedCodec, RaggedPayload, ragged
from capsight.kvcapsule.codecs.sharing import shared_counts
from capsight.kvcapsule.kriging import greedy_selection
from capsight.kvcapsule.plan import Run
from kvcapsule.conftest import BLOCK, blocks, codec, fitted, layouts
from kvcapsule.test_generate import assert_same, batch, full_cache, run
from kvcapsule.test_latent import LAYOUT, compare, pair
from kvcapsule.test_store import edit_header
from tiny import FAMILIES

PAIR = ["adaptive", "evict"]


def plain_counts(energy: list[list[float]], kept: int) -> list[int]:
    """What the blocks of one row keep, one token at a time."""
    least = [list(accumulate(own, min)) for own in energy]
    counts = [max(1, int(0.25 * kept))] * len(energy)
    while sum(counts) < kept * len(energy):
        open_blocks = [i for i, count in enumerate(counts) if count < len(energy[i])]
        counts[max(open_blocks, key=lambda i: least[i][counts[i]])] += 1
    return counts


def rows(*sizes: int) -> list[Run]:
    return [Run(row, 10 * start) for row, size in enumerate(sizes) for start in range(size)]


def uneven(count: int, heads: int = 2, size: int = 8, head_dim: int = 4, seed: int = 7) -> list[torch.Tensor]:
    """Keys and values [M, H, N, D] of blocks of which some say much more than others."""
    scale = torch.logspace(-1, 1, count).roll(seed)[:, None, None, None]
    return [scale * blocks(count, heads, size, head_dim, seed + kind) for kind in (0, 1)]


def lengths(payload: Payload) -> list[int]:
    assert isinstance(payload, RaggedPayload)
    return payload.lengths.tolist()


def equal(a: Payload, b: Payload) -> bool:
    same = type(a) is type(b) and a.tensors.keys() == b.tensors.keys()
    return same and all(torch.equal(x, b.tensors[name]) for name, x in a.tensors.items())


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=3), st.integers(2, 9), st.integers(0, 999), st.data())
def test_counts_are_those_of_giving_one_token_at_a_time(sizes, size, seed, data):
    kept = data.draw(st.integers(1, size))
    g = torch.Generator().manual_seed(seed)
    energy = torch.rand(sum(sizes), size, generator=g) * torch.rand(sum(sizes), 1, generator=g)
    found = shared_counts(energy, sizes, kept)
    expected = [plain_counts(row.tolist(), kept) for row in energy.split(sizes)]
    assert found.tolist() == [count for row in expected for count in row]
    assert [int(row.sum()) for row in found.split(sizes)] == [size * kept for size in sizes]


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 3), st.integers(2, 9), st.booleans(), st.sampled_from(PAIR), st.data())
def test_blocks_keep_the_beginning_of_their_greedy_choice_and_rows_do_not_matter_to_others(
    heads, size, joint, name, data
):
    kept, sizes = data.draw(st.integers(1, size - 1)), data.draw(st.sampled_from([(1,), (4,), (3, 1, 2)]))
    shared = codec(name, kept, heads, size, joint=joint, share="prompt")
    keys, values = uneven(sum(sizes), heads, size)
    payload = shared.encode_runs(keys, values, rows(*sizes))
    counts = lengths(payload)
    features = [shared._features(kind, x) for kind, x in enumerate((keys, values))]
    parts = [torch.cat(features, 2)] if joint else features
    gram = torch.stack([x @ x.mT for x in parts], 1)
    order, _, energy = (x[0] for x in greedy_selection(shared.covariance()[None], gram[None], size))
    expected = [plain_counts(row.tolist(), kept) for row in energy.split(sizes)]
    assert counts == [count for row in expected for count in row]
    places = payload.tensors["kept"].split(counts)
    assert [own.tolist() for own in places] == [
        sorted(own[:count]) for own, count in zip(order.tolist(), counts, strict=True)
    ]
    for kind, x in (("keys", keys), ("values", values)):
        for own, block, at in zip(payload.tensors[kind].split(counts), x, places, strict=True):
            assert torch.equal(own, block[:, at.long()].transpose(0, 1))
    first = 0
    for count in sizes:
        own = slice(first, first + count)
        alone = shared.encode(keys[own], values[own])
        assert equal(payload.select(torch.arange(first, first + count)), alone)
        first += count


@pytest.mark.parametrize("step", [1, 2, 8])
@pytest.mark.parametrize("joint", [True, False])
@pytest.mark.parametrize("name", PAIR)
def test_each_block_decodes_as_it_would_with_its_own_count(monkeypatch, name, joint, step):
    monkeypatch.setattr(ragged, "_STEP", step)
    shared = codec(name, 6, size=16, joint=joint, share="prompt")
    keys, values = uneven(7, size=16)
    payload = shared.encode_runs(keys, values, rows(5, 2))
    counts = lengths(payload)
    assert len(set(counts)) > 2
    decoded, missing = shared.decode(payload), shared.missing(payload)
    for block, count in enumerate(counts):
        alone = codec(name, count, size=16, joint=joint)
        own = alone.encode(keys[block, None], values[block, None])
        kept = own.tensors["kept"][0].long()
        assert torch.equal(payload.tensors["kept"].split(counts)[block].long(), kept)
        for found, expected, x in zip(decoded, alone.decode(own), (keys, values), strict=True):
            torch.testing.assert_close(found[block], expected[0], atol=1e-4, rtol=1e-4)
            assert torch.equal(found[block, :, kept], x[block, :, kept])
        if name == "evict":
            own_missing = alone.missing(own)
            assert missing[block].tolist() == (own_missing[0].tolist() if count < 16 else [False] * 16)
    assert (missing is None) == (name == "adaptive")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [None, 8, 4])
@pytest.mark.parametrize("name", PAIR)
def test_bytes_select_and_join(name, bits, dtype):
    keys, values = (x.to(dtype) for x in uneven(5))
    inner = codec(name, 3, share="prompt")
    shared = inner if bits is None else QuantisedCodec(inner, bits)
    payload = shared.encode_runs(keys, values, rows(3, 2))
    plain = codec(name, 3) if bits is None else QuantisedCodec(codec(name, 3), bits)
    assert payload.nbytes == plain.encode_runs(keys, values, rows(3, 2)).nbytes + 5
    assert payload.nbytes == 5 * shared.payload_nbytes(2, 4, dtype.itemsize)
    whole = shared.decode(payload)
    index = torch.tensor([3, 0, 3, 4])
    for found, x in zip(shared.decode(payload.select(index)), whole, strict=True):
        assert found.dtype == dtype
        torch.testing.assert_close(found, x[index])
    both = payload.select(index[:1]).join(payload.select(index[1:]))
    assert equal(both, payload.select(index))
    none = payload.select(torch.empty(0, dtype=torch.int64))
    assert shared.decode(none)[0].shape == (0, 2, 8, 4)
    assert equal(none.join(payload), payload)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", PAIR)
def test_few_bits_are_those_of_each_block_on_its_own(name, bits):
    keys, values = uneven(5)
    shared = QuantisedCodec(codec(name, 3, share="prompt"), bits)
    payload = shared.encode_runs(keys, values, rows(5))
    counts = lengths(payload)
    assert len(set(counts)) > 1
    decoded = shared.decode(payload)
    for block, count in enumerate(counts):
        alone = QuantisedCodec(codec(name, count), bits)
        own = alone.encode_runs(keys[block, None], values[block, None], rows(1))
        for kind in ("keys", "values"):
            entries = shared.opened(payload).tensors[kind].split(counts)[block]
            assert torch.equal(entries, alone.opened(own).tensors[kind][0])
        for found, expected in zip(decoded, alone.decode(own), strict=True):
            torch.testing.assert_close(found[block], expected[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", PAIR)
def test_keeping_everything_and_a_single_block_are_as_without_sharing(name):
    keys, values = uneven(4)
    everything = codec(name, 8, share="prompt")
    assert equal(everything.encode(keys, values), codec(name, 8).encode(keys, values))
    assert everything.payload_nbytes(2, 4, 4) == codec(name, 8).payload_nbytes(2, 4, 4)
    assert all(map(torch.equal, everything.decode(everything.encode(keys, values)), (keys, values)))
    shared, plain = codec(name, 3, share="prompt"), codec(name, 3)
    a, b = (each.encode_runs(keys, values, rows(1, 1, 1, 1)) for each in (shared, plain))
    for kind in ("keys", "values", "kept"):
        assert torch.equal(a.tensors[kind], b.tensors[kind].flatten(0, 1))
    for x, y in zip(shared.decode(a), plain.decode(b), strict=True):
        torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-5)


def test_several_layers_at_once_with_counts_of_their_own():
    keys, values = uneven(5)
    kinds = [(3, True), (5, True), (3, False), (8, True)]
    codecs = [codec("adaptive", kept, share="prompt", joint=joint) for kept, joint in kinds]
    together = type(codecs[0]).encode_layers(codecs, [keys] * 4, [values] * 4, rows(2, 3))
    for one, payload in zip(codecs, together, strict=True):
        assert equal(payload, one.encode_runs(keys, values, rows(2, 3)))


@settings(max_examples=30, deadline=None)
@given(layouts(), st.sampled_from(PAIR), st.booleans(), st.lists(st.integers(1, 4), min_size=1, max_size=3))
def test_capsules_left_as_they_are_equal_capsules_rebuilt(layout, name, joint, steps):
    caches = pair(layout, name, 3, share="prompt", joint=joint)
    for count in steps:
        assert compare(caches, count) == any(layer.payload for layer in caches[1].capsule_layers.values())


@pytest.mark.parametrize("name", PAIR)
def test_rows_that_move(name):
    caches = pair(LAYOUT, name, 3, share="prompt")
    assert compare(caches, 5)
    for cache in caches:
        cache.crop(-6)
        cache.reorder_cache(torch.tensor([1, 1, 0, 2]))
    assert compare(caches, 1)
    held = lengths(caches[0].capsule_layers[0].payload)
    assert held[:3] == held[3:6]


def test_options_of_a_codec():
    shared = codec("adaptive", 3, share="prompt")
    assert shared.resized(5).share == shared.with_weights("solved").share == "prompt"
    assert shared.with_share("block").share == codec("adaptive", 3).share == "block"
    with pytest.raises(OptionError, match="share must"):
        shared.with_share("row")
    with pytest.raises(OptionError, match="share='block'"):
        shared.with_weights("stored")
    with pytest.raises(OptionError, match="same of every block"):
        codec("static", 3).with_share("prompt")


def test_share_of_a_capsule_its_name_and_its_file(qwen, tmp_path):
    capsule = fitted(qwen)
    shared = capsule.with_share("prompt")
    assert shared.codecs[0].packed is capsule.codecs[0].packed
    assert (capsule.info.share, shared.info.share, shared.name) == ("block", "prompt", "adaptive-shared")
    assert fitted(qwen, share="prompt").info == shared.info
    assert shared.with_bits(4).name == "adaptive-shared-int4"
    assert shared.for_latent() is shared
    changed = shared.with_retained(0.2).with_codec("evict")
    assert {codec.share for codec in changed.codecs.values()} == {"prompt"}
    assert shared.break_even_tokens() >= capsule.break_even_tokens()
    shared.save_pretrained(tmp_path)
    again = KVCapsule.from_pretrained(tmp_path)
    assert again.info == shared.info
    assert {codec.share for codec in again.codecs.values()} == {"prompt"}
    for share in ("row", 1, None, []):
        edit_header(tmp_path, options={"share": share})
        with pytest.raises(CapsuleFileError, match="share must"):
            KVCapsule.from_pretrained(tmp_path)
    edit_header(tmp_path, options={"share": "prompt", "weights": "stored"})
    with pytest.raises(CapsuleFileError, match="solved"):
        KVCapsule.from_pretrained(tmp_path)
    stored, static = {"share": "prompt", "weights": "stored"}, {"share": "prompt", "codec": "static"}
    for options in ({"share": "row"}, stored, static):
        with pytest.raises(OptionError):
            KVCapsule.fit(qwen.model, None, [], **options)


def generated(vlm: Any, capsule: KVCapsule, inputs: Any) -> tuple[Any, Any]:
    cache = capsule.cache(inputs)
    return run(vlm, inputs, cache, min_new_tokens=3, max_new_tokens=3), cache


@pytest.mark.parametrize("bits", [None, 8])
@pytest.mark.parametrize("name", ["qwen2_5_vl", "gemma3"])
def test_generate_and_the_bytes_of_a_cache(name, bits):
    vlm = FAMILIES[name]()
    inputs, capsule = batch(vlm), fitted(vlm).with_bits(bits)
    plain, cache = generated(vlm, capsule, inputs)
    found, shared = generated(vlm, capsule.with_share("prompt"), inputs)
    torch.testing.assert_close(found.logits[0], plain.logits[0])  # the prefill is exact
    runs = len(next(iter(cache.capsule_layers.values())).placement.runs)
    assert shared.nbytes == cache.nbytes + runs * len(capsule.codecs)
    kept = capsule.info.layers[0].kept
    for layer in shared.capsule_layers.values():
        counts, at = layer.payload.lengths, layer.placement.run_rows
        assert len(counts.unique()) > 1
        for row in (0, 1):
            assert int(counts[at == row].sum()) == kept * int((at == row).sum())
    everything = generated(vlm, fitted(vlm, 1.0, share="prompt"), inputs)[0]
    assert_same(run(vlm, inputs, full_cache(vlm), min_new_tokens=3, max_new_tokens=3), everything)


def test_a_row_keeps_what_it_keeps_alone(qwen):
    capsule = fitted(qwen, share="prompt")
    inputs = batch(qwen)
    alone = qwen.inputs([([qwen.picture(0), qwen.picture(1, qwen.other_size)], "what do you see here?")])
    together, one = (generated(qwen, capsule, each)[1].capsule_layers[0] for each in (inputs, alone))
    own = (together.placement.run_rows == 0).nonzero()[:, 0]
    assert len(own) == len(one.placement.runs)
    found = together.payload.select(own)
    assert found.lengths.tolist() == one.payload.lengths.tolist()
    assert torch.equal(found.tensors["kept"], one.payload.tensors["kept"])
    assert len(own) * BLOCK > found.lengths.sum()
