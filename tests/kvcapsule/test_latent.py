"""Attention over capsules as they are, against rebuilding every token and attending to it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from capsight.errors import CapsightError, OptionError
from capsight.kvcapsule import CapsuleCache
from capsight.kvcapsule.attention import BlockRows, TokenMap, latent_attention, plain
from capsight.kvcapsule.codecs import AdaptiveCodec
from capsight.layout import PromptLayout
from kvcapsule.conftest import codec, layouts, row
from kvcapsule.latent_problem import problems
from kvcapsule.test_cache import CONFIG, D, H, N, feed, real

GROUP = 3  # query heads to a KV head
LAYOUT = PromptLayout((row(30, 3, (4, 22)), row(30, 0, (1, 9), (10, 18), (19, 28)), row(30, 7)))


def attend(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """Plain attention `[B, Q, Hq, D]` with scale 1/2, KV heads repeated."""
    keys, values = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (keys, values))
    scores = (query @ keys.mT / 2).masked_fill(~mask, torch.finfo(query.dtype).min)
    return (scores.softmax(-1) @ values).transpose(1, 2)


def tokens(slots: Tensor, tokens_of: TokenMap) -> Tensor:
    """The tokens `[M, N, H, D]` that slots `[M, r, H, D]` stand for."""
    if tokens_of.weights is None:
        return slots
    made = torch.einsum("mtr,mrhd->mthd", tokens_of.weights.expand(len(slots), -1, -1), slots)
    if tokens_of.mean is not None:
        made = made + tokens_of.rest[:, :, None, None] * tokens_of.mean
    return torch.cat([slots, made], 1) if tokens_of.copied else made


@settings(max_examples=40)
@given(problems())
def test_the_pure_function(problem):
    query, keys, values, held, where, mask, _ = problem
    batch, new, length = len(query), query.shape[2], keys.shape[2]
    found = latent_attention(*problem)
    for b in range(batch):
        own = (where.rows == b).nonzero()[:, 0]
        parts = [
            torch.cat([x[b], tokens(slots, map_)[own].flatten(0, 1).transpose(0, 1)], 1)[None]
            for x, slots, map_ in (
                (keys, held.keys, held.key_map),
                (values, held.values, held.value_map),
            )
        ]
        seen = torch.ones(1, 1, new, length, dtype=torch.bool)
        if mask is not None:
            seen = mask[b, None] if mask.dtype == torch.bool else mask[b, None] == 0
        seen = torch.nn.functional.pad(seen, (0, parts[0].shape[2] - length), value=True)
        expected = attend(query[b, None], parts[0], parts[1], seen)[0]
        torch.testing.assert_close(found[b], expected, atol=1e-5, rtol=1e-5)


def pair(layout: PromptLayout, name: str, kept: int, **options: Any) -> tuple[CapsuleCache, CapsuleCache]:
    """Two equal caches, and a prompt in both."""
    codecs = dict.fromkeys((0, 1), codec(name, kept, **options))
    caches = CapsuleCache(codecs, layout, CONFIG), CapsuleCache(codecs, layout, CONFIG)
    new = torch.randn(2, layout.batch_size, H, layout.length, D)
    for cache in caches:
        cache.honours_key_bias = True
        feed(cache, new)
    return caches


def compare(caches: tuple[CapsuleCache, CapsuleCache], count: int, masked: bool = True) -> bool:
    """Feed `count` tokens to both, attend to what each gives; whether the second left its capsules."""
    plain, cache = caches
    layout = cache.layout
    new, seen = torch.randn(2, layout.batch_size, H, count, D), plain.get_seq_length() + count
    query = torch.randn(layout.batch_size, GROUP * H, count, D)
    mask = torch.ones(count, seen, dtype=torch.bool).tril(seen - count)
    mask = mask & real(layout, seen)[:, None, None]
    for layer in (0, 1):
        keys, values = plain.update(new[0], new[1], layer)
        bias, shown = plain.key_bias(layer), mask
        if bias is not None:
            shown = mask & (bias == 0).repeat_interleave(GROUP * H // bias.shape[1], 1)
        expected = attend(query, keys, values, shown)
        with cache.leaving_capsules():
            keys, values = cache.update(new[0], new[1], layer)
            left = cache.take_latent()
        if left is None:
            assert keys.shape[2] == seen
            continue
        assert keys.shape[2] == count
        found = left(query, mask if masked else None, 0.5)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert cache.nbytes == plain.nbytes
    return left is not None


@settings(max_examples=60)
@given(
    layouts(),
    st.sampled_from(["adaptive", "static", "evict", "heads"]),
    st.sampled_from([3, 8]),
    st.booleans(),
    st.booleans(),
    st.lists(st.integers(1, 4), min_size=1, max_size=4),
)
def test_capsules_left_as_they_are_equal_capsules_rebuilt(layout, name, kept, joint, stored, steps):
    options: dict[str, Any] = {} if name == "static" else {"joint": joint}
    if stored and name == "adaptive":
        options["weights"] = "stored"
    caches = pair(layout, name, kept, **options)
    for count in steps:
        assert compare(caches, count) == any(layer.payload for layer in caches[1].capsule_layers.values())


@pytest.mark.parametrize("name", ["adaptive", "heads"])
def test_rows_of_different_images_without_padding_need_no_mask(name):
    layout = PromptLayout((row(30, 0, (4, 22)), row(30, 0, (1, 9), (10, 18), (19, 28)), row(30, 0)))
    caches = pair(layout, name, 3)
    for count in (1, 3, 1):
        assert compare(caches, count, masked=False)


@pytest.mark.parametrize(("name", "options"), [("adaptive", {"weights": "stored"}), ("heads", {})])
def test_crop_moved_rows_and_new_images(name, options):
    caches = pair(LAYOUT, name, 3, **options)
    assert compare(caches, 5)
    for cache in caches:
        cache.crop(-6)
        cache.reorder_cache(torch.tensor([1, 1, 0, 2]))
    assert compare(caches, 1)
    rows = (LAYOUT.rows[i] for i in (1, 1, 0, 2))
    longer = [row(50, r.pad_left, *((b.start, b.end) for b in r.blocks), (35, 45)) for r in rows]
    for cache in caches:
        cache.extend_layout(PromptLayout(tuple(longer)))
    assert not compare(caches, 15)  # it completes runs, so it rebuilds
    assert compare(caches, 2)
    layer = caches[1].capsule_layers[0]
    assert len(layer.placement.runs) == 3 + 3 + 2 + 4
    if name == "heads":  # the new images share among themselves
        new = layer.placement.run_starts >= 35
        for row_of_batch in range(4):
            for own in (new, ~new):
                own = own & (layer.placement.run_rows == row_of_batch)
                assert layer.payload.tensors["counts"][own].sum() == 3 * H * own.sum()


def test_long_turns_are_attended_in_parts(monkeypatch):
    monkeypatch.setattr(plain, "_QUERIES", 2)
    assert compare(pair(LAYOUT, "adaptive", 3), 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_reach_the_query(dtype):
    fitted, slots = codec("adaptive", 3), torch.randn(2, 5, H, N, D)
    held = fitted.latent(fitted.encode(slots[0], slots[1]))
    where = BlockRows(torch.zeros(5, dtype=torch.int64), torch.arange(5), 5)
    exact = torch.randn(2, 1, H, 4, D)
    found = []
    for kind in (torch.float64, dtype):
        query = torch.ones(1, GROUP * H, 2, D, dtype=kind, requires_grad=True)
        short = replace(held, keys=held.keys.to(dtype), values=held.values.to(dtype))
        latent_attention(query, *exact.to(dtype), short, where, None, 0.5)[..., 0].sum().backward()
        found.append(query.grad)
    torch.testing.assert_close(found[1].double(), found[0], atol=1e-2, rtol=1e-2)


def test_what_is_left_must_be_taken():
    _, cache = pair(LAYOUT, "adaptive", 3)
    new = torch.randn(2, 3, H, 1, D)
    with cache.leaving_capsules(), pytest.raises(CapsightError, match=r"capsight\.enable"):
        feed(cache, new)
    assert cache.take_latent() is None


@pytest.mark.parametrize("joint", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stored_weights_are_counted_and_rebuild_the_same(dtype, joint):
    solved = codec("adaptive", 3, joint=joint)
    stored = solved.with_weights("stored")
    blocks = torch.randn(2, 5, H, N, D).to(dtype)
    a, b = (c.encode(blocks[0], blocks[1]) for c in (solved, stored))
    maps = 1 if joint else 2
    assert b.tensors["weights"].shape == (5, maps, N - 3, 3)
    assert b.nbytes == a.nbytes + 5 * maps * (N - 3) * 3 * 2
    assert b.nbytes == 5 * stored.payload_nbytes(H, D, dtype.itemsize)
    for x, y in zip(solved.decode(a), stored.decode(b), strict=True):
        torch.testing.assert_close(x, y, atol=1e-2 if dtype == torch.float32 else 1e-1, rtol=1e-2)
    assert isinstance(stored, AdaptiveCodec)
    assert stored.resized(4).weights == "stored"
    with pytest.raises(OptionError, match="weights"):
        solved.with_weights("both")
    with pytest.raises(OptionError, match="no prediction weights"):
        codec("static", 3).with_weights("stored")
