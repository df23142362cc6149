"""Timing of several models side by side, with models that only sleep."""

from __future__ import annotations

import time
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from capsight import enable
from capsight.evaluation.stock import Compiled
from capsight.evaluation.timing import NEW, TURNS, Round, Timing, summary, time_together
from kvcapsule.conftest import fitted
from kvcapsule.test_generate import batch
from tiny import FAMILIES

INPUTS = {"input_ids": torch.zeros(2, 3, dtype=torch.int64), "attention_mask": torch.ones(2, 3)}


class Sleeper:
    """Takes so long for the first token of all, and for each other one."""

    def __init__(self, name: str, log: list[str], first: float = 0, other: float = 0) -> None:
        self.name, self.log, self.first, self.other = name, log, first, other

    @contextmanager
    def enabled(self):
        self.log.append(self.name)
        yield self
        self.log.append("")

    def generate(self, input_ids, attention_mask, max_new_tokens, stopping_criteria, **options):
        assert attention_mask.shape == input_ids.shape
        assert options.pop("past_key_values", self.name) == self.name
        for token in range(max_new_tokens):
            time.sleep(self.other if token or input_ids.shape[1] > 3 else self.first)
            input_ids = torch.nn.functional.pad(input_ids, (0, 1))
            assert not stopping_criteria(input_ids, None).any()
        return SimpleNamespace(sequences=input_ids, past_key_values=self.name)


def test_each_is_timed_as_if_it_ran_alone():
    every = [Sleeper("a", [], 0.02, 0.001), Sleeper("b", [], 0.01, 0.003)]
    own, others = time_together([sleeper.enabled for sleeper in every], INPUTS, rounds=3)
    assert [len(own), len(others)] == [3, 3]
    assert all(len(r.rates) == TURNS for r in (*own, *others))
    timing, ratios = summary(own, others)
    assert timing.ttft_s == pytest.approx(0.02, rel=0.5)
    assert 1 < ratios.ttft_s < 3
    assert 1 < ratios.tokens_per_s < 4
    assert max(rate for r in others for rate in r.rates) < 2 / 0.003  # of both rows


def test_all_take_turns():
    log: list[str] = []
    time_together([Sleeper(name, log).enabled for name in "abc"], INPUTS, rounds=2)
    assert set(log[1::2]) == {""}
    turns = ["".join(sorted(log[i : i + 6 : 2])) for i in range(0, len(log), 6)]
    assert turns == ["abc"] * (3 * TURNS)
    assert len({tuple(log[i : i + 6 : 2]) for i in range(0, len(log), 6)}) > 1  # in another order each time


def test_ratios_are_of_the_same_turn():
    own = [Round(2.0, (10.0, 20.0, 60.0)), Round(4.0, (40.0, 40.0, 40.0))]
    others = [Round(1.0, (5.0, 20.0, 20.0)), Round(4.0, (40.0, 20.0, 10.0))]
    assert summary(own, others) == (Timing(3.0, 40.0), Timing(1.5, 2.0))


@pytest.mark.parametrize("codec", [None, "heads", "joint"])
@pytest.mark.parametrize("graph", [False, True])
def test_turns_write_what_one_call_writes(codec, graph):
    vlm = FAMILIES["qwen2_5_vl"]()
    inputs = {name: x for name, x in batch(vlm).items() if x is not None}
    capsule = None if codec is None else fitted(vlm, 0.5, codec=codec)
    written = []

    @contextmanager
    def enabled():
        with enable(vlm.model, capsule=capsule) as fast:
            run = Compiled(fast, inputs["input_ids"].shape[1] + NEW) if graph else fast

            def noted(**options):
                done = run.generate(**options)
                written.append(done.sequences)
                return done

            yield SimpleNamespace(generate=noted)

    time_together([enabled], inputs, rounds=1)
    with enable(vlm.model, capsule=capsule) as fast:
        whole = fast.generate(**inputs, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False)
    assert torch.equal(written[-1], whole)
