"""Attention over tokens that heads keep for themselves, against plain softmax attention row by row."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from capsight.kvcapsule.attention import BlockRows, KeptTokens, pieces
from capsight.kvcapsule.attention.native import Source, decode_attention, missing
from kvcapsule.conftest import codec
from kvcapsule.kept_problem import Problem, problem, problems


@contextmanager
def read(ways: tuple[int, tuple[int, ...]]) -> Iterator[None]:
    """Up to so many bytes are copied side by side; what has more is cut into chunks of one of these sizes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "_SHORT", ways[0])
        patch.setattr(pieces, "_CHUNKS", ways[1])
        yield


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(found.double(), expected, atol=tolerance, rtol=tolerance)


WAYS = [(2**30, (1,)), (0, (4,)), (0, (2,)), (0, (1,)), (0, (50,))]  # 50: one run each, and no chunk
EITHER = st.sampled_from(WAYS)


@settings(max_examples=100)
@given(problems(), st.sampled_from([torch.float32, torch.bfloat16, torch.float64]), EITHER)
def test_equals_plain_attention(given_problem, dtype, ways):
    task = given_problem.to(dtype)
    with read(ways):
        found = task.attend()
    assert found.dtype == dtype
    close(found, task.plain(), {torch.float32: 1e-4, torch.bfloat16: 4e-2, torch.float64: 1e-10}[dtype])


@pytest.mark.parametrize("ways", WAYS)
@pytest.mark.parametrize("factor", [40.0, -40.0])
def test_either_side_may_have_all_the_attention(factor, ways):
    """Logs of normalisers may lie far apart: neither overflows, and the smaller one is gone."""
    task = problem([[[3, 2], [1, 4]], [[2, 2]]], 2, 2, 3, 0)
    size = task.query.norm(dim=-1, keepdim=True)
    task = task._replace(query=torch.ones_like(task.query) * size)
    held = KeptTokens(torch.full_like(task.kept.keys, factor), task.kept.values, task.kept.counts)
    for each in (task._replace(kept=held), task._replace(keys=torch.full_like(task.keys, factor))):
        each.rows.plans.clear()
        with read(ways):
            found = each.attend()
        assert torch.isfinite(found).all()
        close(found, each.plain())


@settings(max_examples=25)
@given(problems(), st.sampled_from([torch.float64, torch.float32]), EITHER)
def test_gradients_of_the_query_are_those_of_plain_attention(given_problem, dtype, ways):
    task, grads = given_problem.to(dtype), []
    for attend in (Problem.attend, Problem.plain):
        query = task.query.clone().requires_grad_()
        with read(ways):
            out = attend(task._replace(query=query))
        (out * torch.arange(out.numel()).view(out.shape).sin()).sum().backward()
        grads.append(query.grad.double())
    close(grads[0], grads[1], 1e-10 if dtype == torch.float64 else 1e-4)


@pytest.mark.parametrize("ways", WAYS)
def test_nothing_is_read_of_other_rows_and_heads(ways):
    """NaN in what one head of one row keeps stays there; the last row keeps nothing."""
    task = problem([[[2, 3], [1, 2]], [[4, 1]], []], 2, 1, 2, 3)
    with read(ways):
        clean = task.attend()  # and the plan is remembered
    for first, last, row, head in ((0, 3, 0, 0), (3, 7, 1, 0), (7, 12, 0, 1), (12, 13, 1, 1)):
        values = task.kept.values.clone()
        values[first:last] = torch.nan
        found = task._replace(kept=KeptTokens(task.kept.keys, values, task.kept.counts)).attend()
        hit = torch.zeros(3, 1, 4, dtype=torch.bool)
        hit[row, :, 2 * head : 2 * head + 2] = True
        assert torch.equal(found.isnan().all(-1), hit)
        assert torch.equal(found[~hit], clean[~hit])


def test_what_a_codec_hands_over_is_what_it_keeps():
    fitted = codec("heads", 3)
    payload = fitted.encode(*torch.randn(2, 4, 2, 8, 4))
    held = fitted.latent(payload)
    for name, x in zip(("keys", "values", "counts"), (held.keys, held.values, held.counts), strict=True):
        assert x is payload.tensors[name]  # nothing is copied
    where = BlockRows(torch.tensor([0, 0, 2, 2]), torch.tensor([0, 1, 0, 1]), 2)
    counts = held.counts.long()
    assert held.sizes(where) == [[int(counts[:2, h].sum()), int(counts[2:, h].sum())] for h in (0, 1)]


@given(
    st.integers(1, 3), st.lists(st.integers(0, 40), min_size=3, max_size=9).filter(any), st.integers(1, 20)
)
def test_chunks_and_the_rest_hold_every_token_once(heads, sizes, size):
    batch = len(sizes) // heads
    sizes = [sizes[head * batch : (head + 1) * batch] for head in range(heads)]
    assume(any(map(any, sizes)))
    with read((0, (size,))):
        cut = pieces.Chunks.of(sizes, torch.device("cpu"))
    tokens = torch.arange(sum(map(sum, sizes)))[:, None]
    seen = [*cut.where_they_lie(tokens).squeeze(-1)]
    if cut.rest is not None:
        copied = zip(cut.rest.gather(tokens)[..., 0], cut.rest.hidden, strict=True)
        seen += [own[hidden == 0] for own, hidden in copied]
        assert all(len(own) < size for own in seen[cut.count :])
    assert len(seen) == len(cut.piece)
    pieces_of_heads = iter(tokens[:, 0].split([n for own in sizes for n in own]))
    for head in range(heads):
        for row in range(batch):
            number, own = row * heads + head, next(pieces_of_heads)
            parts = cut.parts.view(cut.none.shape[:2])[number]
            assert (parts[cut.none[number, :, 0] < 0] == len(seen) + number).all()
            *of_piece, exact = parts[cut.none[number, :, 0] == 0].tolist()
            assert exact == len(seen) + number
            assert (cut.piece[of_piece] == number).all()
            assert torch.equal(torch.cat([*(seen[part] for part in of_piece), own[:0]]).sort().values, own)


def test_what_was_worked_out_is_forgotten_with_the_counts():
    task = problem([[[2, 3], [1, 2]], [[4, 1]]], 2, 1, 2, 3)
    task.attend()
    plan = task.rows.plans[task.kept.counts]
    task.attend()
    assert task.rows.plans[task.kept.counts] is plan
    rows, _ = task.rows, task.kept.counts
    del task, _
    assert not rows.plans


def test_long_pieces_are_not_copied(monkeypatch):
    """All but the ends of pieces is read where it lies."""
    task = problem([[[1500, 1300]], [[1400, 1600]]], 1, 1, 2, 1)
    monkeypatch.setattr(pieces, "_SHORT", 0)
    plan = pieces.pieces_of(task.kept, task.rows, 2)
    assert (plan.size, plan.count) == (128, 5800 // 128)
    assert (plan.rest.hidden == 0).sum() < 4 * 128
    assert plan.where_they_lie(task.kept.keys).data_ptr() == task.kept.keys.data_ptr()
    close(task.attend(), task.plain())


@pytest.mark.skipif(bool(missing()), reason="no C++ compiler")
@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
@pytest.mark.parametrize("count", [64, 70])
def test_a_channel_that_is_no_number_reaches_no_other_but_its_neighbour(count, wrong):
    g = torch.Generator().manual_seed(0)
    keys, values = torch.randn(2, 2 * count, 1, 64, generator=g).bfloat16()
    values[count + 3, 0, 6] = wrong  # of the second row
    starts, counts = torch.tensor([[0], [count]]), torch.full((2, 1), count)
    query = torch.randn(2, 7, 1, 64, generator=g).bfloat16()
    out, lse = decode_attention(query, [Source(keys, values, starts, counts)], 0.3)
    assert not out[1, :, 0, 6].isfinite().any()
    out[1, :, 0, 6:8] = 0
    assert out.isfinite().all()
    assert lse.isfinite().all()
