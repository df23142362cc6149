from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from capsight.evaluation import exact_match
from capsight.evaluation.score import mcnemar_p, wilson_interval


def test_exact_match_folds_case_and_spaces_only():
    assert exact_match(" Red  star ", "red star")
    assert not exact_match("red stars", "red star")
    assert not exact_match("", "red")


@given(st.integers(0, 300), st.integers(1, 300))
def test_wilson_holds_the_share(right, total):
    right = min(right, total)
    low, high = wilson_interval(right, total)
    assert 0 <= low <= right / total + 1e-12
    assert right / total - 1e-12 <= high <= 1


def test_wilson_known_value():
    low, high = wilson_interval(50, 100)
    assert low == pytest.approx(0.4038, abs=1e-4)
    assert high == pytest.approx(0.5962, abs=1e-4)


def test_mcnemar_known_values():
    assert mcnemar_p([True, False], [True, False]) == 1.0
    ours, theirs = [False] * 10, [True] * 10
    assert mcnemar_p(ours, theirs) == pytest.approx(2 / 2**10)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), max_size=40))
def test_mcnemar_is_symmetric(pairs):
    a, b = [x for x, _ in pairs], [y for _, y in pairs]
    assert mcnemar_p(a, b) == pytest.approx(mcnemar_p(b, a))
    assert 0 < mcnemar_p(a, b) <= 1
