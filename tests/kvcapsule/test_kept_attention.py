"""Attention over tokens that heads keep for themselves, against plain softmax attention row by row."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from capsight.kvcapsule.latent import BlockRows, KeptTokens, kept
from kvcapsule.conftest import codec
from kvcapsule.kept_problem import D, Problem, problem, problems


@contextmanager
def many(pieces: int) -> Iterator[None]:
    """So many pieces are few enough for a call each; more are put side by side."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kept, "_MANY", pieces)
        yield


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(found.double(), expected, atol=tolerance, rtol=tolerance)


EITHER = st.sampled_from([0, 99])  # all pieces side by side, or each on its own


@settings(max_examples=100, deadline=None)
@given(problems(), st.sampled_from([torch.float32, torch.bfloat16, torch.float64]), EITHER)
def test_equals_plain_attention(given_problem, dtype, pieces):
    task = given_problem.to(dtype)
    with many(pieces):
        found = task.attend()
    assert found.dtype == dtype
    close(found, task.plain(), {torch.float32: 1e-4, torch.bfloat16: 4e-2, torch.float64: 1e-10}[dtype])


@pytest.mark.parametrize("pieces", [0, 99])
@pytest.mark.parametrize("factor", [40.0, -40.0])
def test_either_side_may_have_all_the_attention(factor, pieces):
    """Logs of normalisers may lie far apart: neither overflows, and the smaller one is gone."""
    task = problem([[[3, 2], [1, 4]], [[2, 2]]], 2, 2, 3, 0)
    size = task.query.norm(dim=-1, keepdim=True)
    task = task._replace(query=torch.ones_like(task.query) * size)
    held = KeptTokens(torch.full_like(task.kept.keys, factor), task.kept.values, task.kept.counts)
    for each in (task._replace(kept=held), task._replace(keys=torch.full_like(task.keys, factor))):
        with many(pieces):
            found = each.attend()
        assert torch.isfinite(found).all()
        close(found, each.plain())


@pytest.fixture
def calls(monkeypatch) -> list[tuple[int, ...]]:
    """Shapes of the keys that attention goes over at once."""
    shapes, original = [], kept.partial_attention

    def noting(query, keys, *rest):
        shapes.append(tuple(keys.shape))
        return original(query, keys, *rest)

    monkeypatch.setattr(kept, "partial_attention", noting)
    return shapes


SEGMENTS = [
    (511, 2, [(1, 511)]),
    (512, 2, [(2, 256)]),
    (513, 2, [(2, 256), (1, 1)]),
    (1025, 3, [(3, 341), (1, 2)]),
    (1024, 4, [(4, 256)]),
    (700, 1, [(1, 700)]),
]


@pytest.mark.parametrize("grad", [False, True], ids=["plain", "grad"])
@pytest.mark.parametrize(("tokens", "count", "parts"), SEGMENTS)
def test_long_segments_are_split_over_threads(calls, tokens, count, parts, grad):
    """Blocks of a segment are attended to as one: where they end does not matter."""
    of_blocks = [[tokens // 2, 3], [tokens - tokens // 2, 4]]
    task = problem([of_blocks, [], [[2, 1]]], 2, 3, 2, 1, "bool rows")
    task.query.requires_grad_(grad)
    with threads(count):
        close(task.attend().detach(), task.plain().detach())
    exact, *held = calls
    assert exact == (3, 2, 5, D)
    assert held == [(1, *part, D) for part in parts] + [(1, 1, size, D) for size in (2, 7, 1)]
    with threads(count):
        half = task.to(torch.bfloat16)
        close(half.attend().detach(), half.plain().detach(), 1e-2)


@settings(max_examples=25, deadline=None)
@given(problems(), st.sampled_from([torch.float64, torch.float32]), EITHER)
def test_gradients_of_the_query_are_those_of_plain_attention(given_problem, dtype, pieces):
    task, grads = given_problem.to(dtype), []
    for attend in (Problem.attend, Problem.plain):
        query = task.query.clone().requires_grad_()
        with many(pieces):
            out = attend(task._replace(query=query))
        (out * torch.arange(out.numel()).view(out.shape).sin()).sum().backward()
        grads.append(query.grad.double())
    close(grads[0], grads[1], 1e-10 if dtype == torch.float64 else 1e-4)


def test_many_short_pieces_are_put_side_by_side(calls, monkeypatch):
    counts = [[[3, 1, 2], [2, 1, 1]], [[1, 4, 1]], [[2, 2, 6]]]  # 9 pieces, of 6 tokens at most
    apart = [(1, 1, size, D) for size in (5, 1, 2, 2, 4, 2, 3, 1, 6)]
    for rows, small, expected in (
        (3, 9 * 6 * D * 4 + 1, [(9, 1, 6, D)]),
        (3, 9 * 6 * D * 4, apart),  # too long
        (2, 2**20, apart[:2] + apart[3:5] + apart[6:8]),  # too few
    ):
        monkeypatch.setattr(kept, "_SMALL", small)
        task = problem(counts[:rows], 2, 2, 1, 4)
        calls.clear()
        close(task.attend(), task.plain())
        assert calls[1:] == expected


@pytest.mark.parametrize("pieces", [0, 99])
def test_nothing_is_read_of_other_rows_and_heads(pieces, monkeypatch):
    """NaN in what one head of one row keeps stays there."""
    monkeypatch.setattr(kept, "_MANY", pieces)
    task = problem([[[2, 3], [1, 2]], [[4, 1]]], 2, 1, 2, 3)
    clean = task.attend()
    for first, last, row, head in ((0, 3, 0, 0), (3, 7, 1, 0), (7, 12, 0, 1), (12, 13, 1, 1)):
        values = task.kept.values.clone()
        values[first:last] = torch.nan
        found = task._replace(kept=KeptTokens(task.kept.keys, values, task.kept.counts)).attend()
        hit = torch.zeros(2, 1, 4, dtype=torch.bool)
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
