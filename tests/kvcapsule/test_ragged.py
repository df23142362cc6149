"""Capsules that keep different numbers of tokens, packed without padding, against lists of lists."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from capsight.kvcapsule.codecs import RaggedPayload
from kvcapsule.conftest import entries, equal

Case = tuple[Tensor, Tensor, Tensor]  # keys, values [M, H, N, D] and what to keep, bool [M, H, N]


def case(count: int, heads: int, size: int, share: float, seed: int) -> Case:
    """Blocks of which a share of the tokens is kept, nothing of some heads."""
    g = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(count, heads, size, 3, generator=g) for _ in range(2))
    return keys, values, torch.rand(count, heads, size, generator=g) < share


@st.composite
def cases(draw: st.DrawFn, heads: int | None = None, size: int | None = None) -> Case:
    heads, size = heads or draw(st.integers(1, 3)), size or draw(st.integers(2, 7))
    share = draw(st.sampled_from([0.0, 0.3, 0.7, 1.0]))
    return case(draw(st.integers(0, 4)), heads, size, share, draw(st.integers(0, 999)))


def as_lists(payload: RaggedPayload) -> list:
    return [
        [(at, keys.tolist(), values.tolist()) for at, keys, values in block] for block in entries(payload)
    ]


def plain(keys: Tensor, values: Tensor, keep: Tensor) -> list:
    """Positions, keys and values that each head of each block keeps."""
    found = []
    for block in range(len(keep)):
        found.append([])
        for head in range(keep.shape[1]):
            at = [n for n, kept in enumerate(keep[block, head].tolist()) if kept]
            found[-1].append((at, keys[block, head, at].tolist(), values[block, head, at].tolist()))
    return found


@settings(max_examples=60)
@given(cases())
def test_pack_and_where_entries_lie(given_case):
    keys, values, keep = given_case
    payload = RaggedPayload.pack(*given_case)
    blocks, heads, size = keep.shape
    assert as_lists(payload) == plain(*given_case)
    by_head = [(head, block) for head in range(heads) for block in range(blocks)]
    counts = [int(keep[block, head].sum()) for head, block in by_head]
    assert payload.lengths.tolist() == counts
    assert payload.owners().tolist() == [i for i, count in enumerate(counts) for _ in range(count)]
    flat = [i * size + n for i, (h, b) in enumerate(by_head) for n in range(size) if keep[b, h, n]]
    assert payload.slots(size).tolist() == flat
    assert torch.equal(payload.mask(size), keep)
    for name, x in (("keys", keys), ("values", values)):
        assert torch.equal(payload.spread(name, size), x * keep[..., None])
    assert payload.nbytes == keep.sum() * (2 * 3 * 4 + 1) + 4 * blocks * heads


@settings(max_examples=60)
@given(cases(), st.data())
def test_select_takes_blocks_in_any_order_also_twice_and_none(given_case, data):
    blocks = len(given_case[2])
    index = data.draw(st.lists(st.integers(0, blocks - 1), max_size=5)) if blocks else []
    payload = RaggedPayload.pack(*given_case)
    found = payload.select(torch.tensor(index, dtype=torch.int64))
    lists = as_lists(payload)
    assert as_lists(found) == [lists[i] for i in index]
    assert equal(found, RaggedPayload.pack(*(x[index] for x in given_case)))


@settings(max_examples=60)
@given(st.integers(1, 3), st.integers(2, 7), st.data())
def test_join_puts_blocks_of_one_after_those_of_the_other(heads, size, data):
    first, second, third = (data.draw(cases(heads, size)) for _ in range(3))
    a, b, c = (RaggedPayload.pack(*each) for each in (first, second, third))
    assert as_lists(a.join(b)) == as_lists(a) + as_lists(b)
    together = RaggedPayload.pack(*(torch.cat(parts) for parts in zip(first, second, third, strict=True)))
    assert equal(a.join(b).join(c), together)
    assert equal(a.join(b.join(c)), together)


def test_parts_that_are_quantised_go_with_their_entries():
    """`select` and `join` know no names but `counts`: whatever else there is has one row per entry."""
    payload = RaggedPayload.pack(*case(4, 2, 6, 0.5, 0))
    levels = torch.arange(len(payload.tensors["keys"]), dtype=torch.uint8)[:, None]
    wider = RaggedPayload(payload.tensors | {"keys.levels": levels})
    index = torch.tensor([2, 0, 2])
    found = wider.select(index).join(wider)
    origin = found.tensors["keys.levels"][:, 0].long()
    assert torch.equal(found.tensors["keys"], payload.tensors["keys"][origin])
    assert found.tensors["keys.levels"].dtype == torch.uint8


@pytest.mark.parametrize(("size", "dtype"), [(256, torch.uint8), (257, torch.int32)])
def test_positions_take_as_many_bytes_as_they_need(size, dtype):
    keys, values, keep = case(2, 2, size, 0.5, 1)
    keep[0, 1, -1] = True
    payload = RaggedPayload.pack(keys, values, keep, torch.int16)
    assert payload.tensors["kept"].dtype == dtype
    assert payload.tensors["counts"].dtype == torch.int16
    assert entries(payload)[0][1][0][-1] == size - 1
    assert torch.equal(payload.spread("values", size), values * keep[..., None])
