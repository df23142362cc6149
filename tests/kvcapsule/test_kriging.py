"""The batched rank-one algorithms against direct solves in loops."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from capsight.kvcapsule.codecs.kriging import (
    greedy_selection,
    pivoted_cholesky,
    prediction_weights,
    with_nugget,
)


def covariance(size: int, groups: int, seed: int) -> torch.Tensor:
    x = torch.randn(
        groups, size, 2 * size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )
    return with_nugget(x @ x.mT / (2 * size), 1e-2)


def predicted(c: torch.Tensor, kept: list[int], x: torch.Tensor) -> torch.Tensor:
    """All tokens [N, F] from the kept ones of x [N, F]."""
    if not kept:
        return torch.zeros_like(x)
    return c[:, kept] @ torch.linalg.solve(c[kept][:, kept], x[kept])


sizes = st.tuples(st.integers(2, 9), st.integers(1, 2), st.integers(1, 4), st.integers(0, 999), st.data())


@settings(max_examples=60)
@given(sizes)
def test_greedy_selection_takes_the_worst_predicted_token_each_time(case):
    size, groups, count, seed, data = case
    kept = data.draw(st.integers(1, size))
    c = covariance(size, groups, seed)
    g = torch.Generator().manual_seed(seed + 1)
    x = torch.randn(count, groups, size, 5, dtype=torch.float64, generator=g)
    other = covariance(size, groups, seed + 2)  # of a second layer, which must not matter
    gram = x @ x.mT
    found, factor = greedy_selection(torch.stack([other, c]), torch.stack([gram.flip(2), gram]), kept)
    assert factor.shape == (2, count, groups, size, kept)
    for block in range(count):
        chosen: list[int] = []
        for _ in range(kept):
            energy = sum(
                (x[block, i] - predicted(c[i], chosen, x[block, i])).pow(2).sum(1) for i in range(groups)
            )
            energy[chosen] = -1
            chosen.append(int(energy.argmax()))
        assert found[1, block].tolist() == chosen


@settings(max_examples=60)
@given(sizes)
def test_prediction_weights_solve_the_normal_equations(case):
    size, groups, count, seed, data = case
    c = covariance(size, groups, seed)
    kept = [sorted(data.draw(st.permutations(range(size)))[: size // 2 + 1]) for _ in range(count)]
    weights = prediction_weights(c, torch.tensor(kept))
    for block in range(count):
        for group in range(groups):
            expected = predicted(c[group], kept[block], torch.eye(size, dtype=torch.float64))[:, kept[block]]
            torch.testing.assert_close(weights[block, group], expected)


@settings(max_examples=40)
@given(sizes)
def test_a_selection_knows_the_weights(case):
    size, groups, count, seed, data = case
    kept = data.draw(st.integers(1, size))
    c = covariance(size, groups, seed)
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(count, groups, size, 5, dtype=torch.float64, generator=g)
    selection = greedy_selection(c[None], (x @ x.mT)[None], kept)
    wanted = torch.arange(size).expand(1, count, -1)
    expected = prediction_weights(c, selection.order[0])
    torch.testing.assert_close(selection.layer(0).weights(wanted)[0], expected)
    some = prediction_weights(c, selection.order[0], wanted[0, :, 1:])
    torch.testing.assert_close(some, expected[:, :, 1:])


@settings(max_examples=40)
@given(st.integers(2, 9), st.integers(0, 999), st.data())
def test_pivoted_cholesky_takes_the_largest_residual_variance_each_time(size, seed, data):
    c, kept = covariance(size, 1, seed)[0], data.draw(st.integers(1, size))
    chosen: list[int] = []
    for _ in range(kept):
        residual = c - predicted(c, chosen, c)
        variance = residual.diagonal().clone()
        variance[chosen] = -1
        chosen.append(int(variance.argmax()))
    assert pivoted_cholesky(c, kept).tolist() == sorted(chosen)


def test_float32_chooses_as_float64_on_large_blocks():
    c = covariance(64, 2, 3)
    x = torch.randn(6, 2, 64, 256, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).cumsum(2)
    gram = (x @ x.mT)[None]
    double, single = (greedy_selection(c[None].to(t), gram.to(t), 26) for t in (torch.float64, torch.float32))
    assert torch.equal(double.order, single.order)
