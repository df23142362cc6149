"""How `capsight calibrate` sets prompts aside to measure the drop."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from capsight.cli.calibrate import split


@given(st.integers(1, 40), st.integers(1, 40))
def test_as_many_vote_and_are_held_out_as_was_asked(samples, held_out):
    items = list(range(samples + held_out))
    voting, held = split(items, samples, held_out)
    assert (len(voting), len(held)) == (samples, held_out)
    assert sorted(voting + held) == items


@given(st.integers(1, 20), st.integers(1, 20))
def test_both_are_spread_over_all_items(samples, held_out):
    items = list(range(samples + held_out))
    _, held = split(items, samples, held_out)
    for end in items:
        share = sum(item <= end for item in held) - (end + 1) * held_out / len(items)
        assert -1 < share <= 0
