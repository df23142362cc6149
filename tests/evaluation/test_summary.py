from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from capsight.evaluation import MethodResult, Outcome, paired, split_label, summary
from capsight.evaluation.score import difference_interval


def result(right: list[bool], per_item: int = 2) -> MethodResult:
    outcomes = [
        Outcome(f"item {i // per_item}", "find" if i % 2 else "plate", 1 + i // per_item % 2, r, True, 0.1)
        for i, r in enumerate(right)
    ]
    return MethodResult(outcomes, nbytes=50, nbytes_full=100)


def test_summary_compares_with_full():
    full, half = result([True] * 40), result([True, False] * 20)
    report = summary({"full": full, "evict 0.2": half})
    row = report["evict 0.2"]
    assert (row["exact_match"], row["drop"], row["p_value"]) == (50.0, 50.0, pytest.approx(2e-6, abs=1e-6))
    assert row["drop_interval"] == [50.0, 50.0]  # every item lost one of two
    assert list(row["by"]["images"]) == ["1", "2"]
    assert row["by"]["task"]["find"]["exact_match"] == 0.0
    assert report["full"]["drop"] == 0.0


def test_paired_takes_equal_budgets():
    good, bad = result([True] * 40), result([False] * 10 + [True] * 30)
    rows = paired(
        {"full": good, "adaptive 0.4": good, "evict 0.4": bad, "evict 0.2": bad, "quanto-int4": bad},
        "adaptive",
    )
    assert [(row["method"], row["against"]) for row in rows] == [("adaptive 0.4", "evict 0.4")]
    assert rows[0]["difference"] == 25.0
    assert rows[0]["only"] == [10, 0]
    assert rows[0]["p_value"] == pytest.approx(2 / 2**10, abs=1e-6)
    low, high = rows[0]["interval"]
    assert 0 < low < 25 < high
    assert paired({"full": good, "quanto-int4": bad}, "quanto-int4") == []


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=40))
def test_interval_holds_the_difference_and_turns_with_it(pairs):
    ours, theirs = (result([pair[k] for pair in pairs]).outcomes for k in (0, 1))
    low, high = difference_interval(ours, theirs, 200)
    assert -1 <= low <= high <= 1
    back = difference_interval(theirs, ours, 200)
    assert (low, high) == pytest.approx((-back[1], -back[0]))


def test_labels():
    assert split_label("adaptive 0.4") == ("adaptive", 0.4)
    assert split_label("full + head map") == ("full + head map", None)
    assert split_label("quanto-int4") == ("quanto-int4", None)
