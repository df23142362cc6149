"""Timing of several models side by side, with models that only sleep."""

from __future__ import annotations

import threading
import time
from typing import ClassVar

import pytest
import torch

from capsight.evaluation.timing import TURN, Timing, medians, ratios, time_together

INPUTS = {"input_ids": torch.zeros(2, 3, dtype=torch.int64)}


class Sleeper:
    """Takes so long for the first token, and for each other one."""

    running: ClassVar[list[Sleeper]] = []

    def __init__(self, first: float, other: float, fails_at: int = -1) -> None:
        self.first, self.other, self.fails_at = first, other, fails_at
        self.made: list[int] = []

    def generate(self, input_ids, max_new_tokens, min_new_tokens, do_sample, stopping_criteria):
        assert max_new_tokens == min_new_tokens
        assert not do_sample
        for token in range(max_new_tokens):
            Sleeper.running.append(self)
            if token == self.fails_at:
                raise ValueError("token")
            time.sleep(self.other if token else self.first)
            self.made.append(token)
            if bool(stopping_criteria(input_ids, None).all()):
                break


@pytest.fixture(autouse=True)
def nobody_runs():
    Sleeper.running = []


def test_each_is_timed_as_if_it_ran_alone():
    fast, slow = Sleeper(0.02, 0.001), Sleeper(0.01, 0.003)
    own, others = time_together([fast, slow], INPUTS, 12, rounds=3)
    assert len(own) == len(others) == 3
    assert medians(own).ttft_s == pytest.approx(0.02, rel=0.5)
    assert medians(others).ttft_s == pytest.approx(0.01, rel=0.5)
    assert 1 < medians(ratios(own, others)).tokens_per_s < 4
    assert max(t.tokens_per_s for t in others) < 2 / 0.003  # of both rows


def test_all_make_a_few_tokens_in_turns():
    every = [Sleeper(0, 0) for _ in range(3)]
    time_together(every, INPUTS, 1 + 2 * TURN, rounds=1)
    turns, at = [], 0
    for length in ([1] * 3 + [TURN] * 6) * 2:
        turns.append({id(who) for who in Sleeper.running[at : at + length]})
        at += length
    assert at == len(Sleeper.running)
    assert all(len(turn) == 1 for turn in turns)
    assert all(len(set.union(*turns[i : i + 3])) == 3 for i in range(0, len(turns), 3))


@pytest.mark.parametrize("fails_at", [0, 1, TURN, 2 * TURN])
def test_where_one_fails_all_end(fails_at):
    before = threading.active_count()
    with pytest.raises(ValueError, match="token"):
        time_together([Sleeper(0, 0), Sleeper(0, 0, fails_at)], INPUTS, 40, rounds=2)
    assert threading.active_count() == before


def test_an_interrupt_ends_all(monkeypatch):
    def interrupted(self):
        raise KeyboardInterrupt

    every = [Sleeper(0, 0), Sleeper(0, 0)]
    monkeypatch.setattr("capsight.evaluation.timing._Relay.go_on", interrupted)
    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        time_together(every, INPUTS, 40, rounds=2)
    assert threading.active_count() == before
    assert not any(sleeper.made for sleeper in every)


def test_ratios_are_of_the_same_round():
    own, others = [Timing(2.0, 10.0), Timing(4.0, 40.0)], [Timing(1.0, 5.0), Timing(4.0, 10.0)]
    assert ratios(own, others) == [Timing(2.0, 2.0), Timing(1.0, 4.0)]
