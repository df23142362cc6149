"""Sharing tokens out over layers: the pure functions, against exhaustive search and their promises."""

from __future__ import annotations

from itertools import pairwise, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capsight.errors import CapsuleFileError, OptionError
from capsight.kvcapsule.budget import (
    LayerNeeds,
    check_budget,
    error_curve,
    measured_counts,
    share_out,
    water_fill,
)

unit = st.floats(0, 1)


@st.composite
def needs(draw: st.DrawFn, size: int | None = None) -> tuple[LayerNeeds, int]:
    size = draw(st.integers(2, 24)) if size is None else size
    counts = measured_counts(size)
    layers = draw(st.integers(1, 6))
    rows = st.lists(st.floats(0, 1.5), min_size=len(counts), max_size=len(counts)).map(tuple)
    errors = tuple(draw(rows) for _ in range(layers))
    return LayerNeeds(counts, errors, tuple(draw(unit) for _ in range(layers))), size


@given(needs())
def test_curves_are_convex_and_the_points_lie_on_or_above_them(case):
    found, size = case
    for errors in found.errors:
        curve = error_curve(found.kept, errors, size)
        assert len(curve) == size + 1
        assert curve[-1] == 0
        gains = [a - b for a, b in pairwise(curve)]
        assert all(gain >= -1e-12 for gain in gains)
        assert all(later <= gain + 1e-12 for gain, later in pairwise(gains))
        assert all(curve[n] <= error + 1e-12 for n, error in zip(found.kept, errors, strict=True))


def test_a_convex_curve_goes_through_its_points():
    assert error_curve([1, 2], [0.5, 0.2], 4) == pytest.approx([1, 0.5, 0.2, 0.1, 0])
    assert error_curve([1, 2], [0.9, 0.2], 4) == pytest.approx([1, 0.6, 0.2, 0.1, 0])  # not above the chord


@settings(max_examples=50)
@given(needs())
def test_average_is_exact_within_bounds_and_no_layer_loses_when_it_grows(case):
    found, size = case
    before = (0,) * len(found.errors)
    for kept in range(1, size + 1):
        counts = found.share_out(kept, size)
        assert sum(counts) == kept * len(found.errors)
        assert all(max(kept // 4, 1) <= count <= size for count in counts)
        assert all(a <= b for a, b in zip(before, counts, strict=True))
        before = counts


@settings(max_examples=40)
@given(needs(size=6), st.integers(1, 6))
def test_no_other_way_to_share_out_leaves_less_error(case, kept):
    found, size = case
    curves = [error_curve(found.kept, errors, size) for errors in found.errors[:3]]
    weights = found.attention[:3]

    def error(counts):
        return sum(w * curve[n] for w, curve, n in zip(weights, curves, counts, strict=True))

    others = product(range(1, size + 1), repeat=len(curves))
    best = min(error(n) for n in others if sum(n) == kept * len(curves))
    assert error(water_fill(curves, weights, kept)) == pytest.approx(best, abs=1e-9)


@settings(max_examples=50)
@given(needs(), unit, st.data())
def test_layers_alike_or_without_attention_keep_the_same(case, share, data):
    found, size = case
    layers, kept = len(found.errors), data.draw(st.integers(1, size))
    alike = LayerNeeds(found.kept, (found.errors[0],) * layers, (share,) * layers)
    unseen = LayerNeeds(found.kept, found.errors, (0.0,) * layers)
    for every in (alike, unseen):
        assert share_out("water-filled", every, layers, kept, size) == (kept,) * layers
    assert share_out("uniform", None, layers, kept, size) == (kept,) * layers


def test_more_attention_or_more_error_means_more_tokens():
    hard, easy = [1, 0.75, 0.5, 0.25, 0, 0, 0, 0, 0], [1, 0.3, 0.1, 0, 0, 0, 0, 0, 0]
    assert water_fill([hard, easy], [1, 1], 3) == (4, 2)
    assert water_fill([hard, hard], [1, 2], 3) == (2, 4)
    assert water_fill([hard, easy], [0, 1], 4) == (4, 4)  # neither gains more from three on


def test_what_is_malformed_is_refused():
    with pytest.raises(OptionError, match="budget must"):
        check_budget("greedy")
    with pytest.raises(OptionError, match="fit it again"):
        share_out("water-filled", None, 2, 3, 8)
    good = {"kept": [2, 4], "errors": [[0.5, 0.1]] * 2, "attention": [0.1, 0.2]}
    assert LayerNeeds.from_header(good, 2, 8).attention == (0.1, 0.2)
    for name, value in (
        ("kept", [4, 2]), ("kept", [0, 4]), ("kept", [2, 8]), ("kept", None), ("errors", [[0.5, 0.1]]),
        ("errors", [[0.5], [0.1]]), ("errors", [[0.5, float("nan")]] * 2), ("errors", "x"),
        ("attention", [0.1]), ("attention", [0.1, -1]), ("attention", [0.1, "x"]),
    ):  # fmt: skip
        with pytest.raises(CapsuleFileError, match="needs"):
            LayerNeeds.from_header(good | {name: value}, 2, 8)
    with pytest.raises(CapsuleFileError, match="needs"):
        LayerNeeds.from_header([], 2, 8)
