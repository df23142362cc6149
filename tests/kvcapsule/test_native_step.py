"""Tokens that are put behind others natively, alone or in one call with a step's attention."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from capsight.kvcapsule.attention.native import (
    OneToken,
    Source,
    Sources,
    Steps,
    append,
    decode_attention,
    missing,
)
from kvcapsule.test_native import source

pytestmark = pytest.mark.skipif(bool(missing()), reason="no C++ compiler")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_goes_behind_those_of_its_piece(dtype):
    batch, heads, room, channels = 3, 2, 5, 6
    keys, values = (torch.zeros(batch * room, heads, channels, dtype=dtype) for _ in range(2))
    starts = (torch.arange(batch) * room)[:, None].expand(-1, heads).contiguous()
    counts = torch.tensor([[0, 1], [2, 0], [4, 4]])
    tail, before = Source(keys, values, starts, counts), counts.clone()
    new = torch.randn(2, batch, 1, heads, channels).to(dtype).transpose(2, 3)  # as models have it
    append(tail, *new)
    assert torch.equal(counts, before + 1)
    for row, head in product(range(batch), range(heads)):
        at = row * room + before[row, head]
        for side, of_new in ((keys, new[0]), (values, new[1])):
            assert torch.equal(side[at, head], of_new[row, head, 0])
            side[at, head] = 0
    assert not keys.any()
    assert not values.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_is_one_call_until_the_room_is_full(dtype):
    g = torch.Generator().manual_seed(0)
    batch, heads, room, channels = 2, 2, 3, 16
    kept = source(torch.tensor([[70, 5], [9, 0]]), str(dtype).split(".")[1], False, False, channels, 2, g)
    starts = (torch.arange(batch) * room)[:, None].expand(-1, heads).contiguous()
    ours, theirs = (
        Source(*torch.zeros(2, batch * room, heads, channels, dtype=dtype), starts, torch.zeros_like(starts))
        for _ in range(2)
    )
    query = torch.randn(batch, 2 * heads, 1, channels, generator=g).to(dtype)
    step = OneToken(query, (batch, room, heads, channels), Sources((kept, ours)))
    for held in range(room + 1):
        new = torch.randn(2, batch, 1, heads, channels, generator=g).to(dtype).transpose(2, 3)
        out = step(query, *new, held, 0.2)
        if held == room:
            assert out is None
            break
        append(theirs, *new)
        assert torch.equal(out, decode_attention(query, [kept, theirs], 0.2)[0].transpose(1, 2))
        for side in ("keys", "values", "counts"):
            assert torch.equal(getattr(ours, side), getattr(theirs, side))
    assert (ours.counts == room).all()


@pytest.mark.parametrize("which", range(3))
@pytest.mark.parametrize("how", ["dtype", "size"])
def test_a_step_of_another_kind_does_nothing(which, how):
    starts = torch.zeros(1, 1, dtype=torch.int64)
    room = Source(*torch.zeros(2, 4, 1, 8), starts, starts.clone())
    given = [torch.ones(1, 2 if i == 0 else 1, 1, 8) for i in range(3)]
    step = OneToken(given[0], (1, 4, 1, 8), Sources((room,)))
    given[which] = given[which].half() if how == "dtype" else given[which][..., :4]
    assert step(*given, 0, 1.0) is None
    assert not room.counts.any()
    assert not room.keys.any()


def test_compiled_graphs_take_levels_without_a_token():
    none, counts = torch.zeros(0, 1), torch.zeros(1, 2, dtype=torch.int64)
    levels, steps = torch.zeros(0, 1, 16, dtype=torch.uint8), Steps(8, none, none, key_step=none)
    sources = [Source(levels, levels, counts, counts, steps=steps)]
    attend = torch.compile(lambda query: decode_attention(query, sources, 0.5)[0] + 1, backend="aot_eager")
    assert (attend(torch.randn(1, 4, 1, 16)) == 1).all()
