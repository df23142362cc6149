"""Times generation: time to first token and decode speed, measured inside one `generate` call."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from random import Random
from statistics import median
from threading import Semaphore
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from capsight.runtime import FastModel


@dataclass(frozen=True, slots=True)
class Timing:
    """One run, or medians over several.

    Attributes:
        ttft_s: seconds from the call to the first new token, image encoding and prefill included.
        tokens_per_s: new tokens per second after the first, over all rows of the batch.
    """

    ttft_s: float
    tokens_per_s: float


TURN = 8
"""Tokens that each makes before others go on, in `time_together`."""


class _Clock(StoppingCriteria):
    """Never stops; notes when each new token was there."""

    def __init__(self) -> None:
        self.ticks: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        if input_ids.is_cuda:
            torch.cuda.synchronize()
        self.ticks.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def time_once(fast: FastModel, inputs: Mapping[str, Any], new_tokens: int) -> Timing:
    """Generate `new_tokens` (two or more) for every row; the end token does not stop the run."""
    clock = _Clock()
    began = time.perf_counter()
    fast.generate(
        **inputs,
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        stopping_criteria=StoppingCriteriaList([clock]),
    )
    rows = inputs["input_ids"].shape[0]
    return Timing(clock.ticks[0] - began, rows * (len(clock.ticks) - 1) / (clock.ticks[-1] - clock.ticks[0]))


class _Relay(StoppingCriteria):
    """Notes how long each new token took, and rests after the first one and every `TURN` more."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.ended = self.given_up = False
        self._may, self._rests = Semaphore(0), Semaphore(0)

    def run(self, fast: FastModel, options: Mapping[str, Any]) -> None:
        """Generate, as far as `go_on` lets it."""
        self._may.acquire()
        try:
            self._since = time.perf_counter()
            if not self.given_up:
                fast.generate(**options, stopping_criteria=StoppingCriteriaList([self]))
        finally:
            self.ended = True
            self._rests.release()

    def go_on(self) -> None:
        """Let it run, and wait until it rests or has ended."""
        self._may.release()
        self._rests.acquire()

    def give_up(self) -> None:
        """Have it end, wherever it is."""
        self.given_up = True
        self._may.release()

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        if input_ids.is_cuda:
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self._since)
        if len(self.seconds) % TURN == 1:
            self._rests.release()
            self._may.acquire()
        self._since = time.perf_counter()
        return torch.full(input_ids.shape[:1], self.given_up, device=input_ids.device)


def time_together(
    every: Sequence[FastModel], inputs: Mapping[str, Any], new_tokens: int, rounds: int
) -> list[list[Timing]]:
    """`time_once` of several, a few tokens each in turns, in random order, so that all see the same machine.

    What others do there changes from second to second. Each has a thread of its own, of which one runs at a
    time.

    Args:
        every: models, each enabled by itself: a model that several share has the hooks of all.
        inputs: of a processor.
        new_tokens: for every row, two or more; the end token stops nothing.
        rounds: how many count, after one that warms up.

    Returns:
        The timings of each model, round by round.
    """
    options = {**inputs, "max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False}
    rows, order = inputs["input_ids"].shape[0], Random(0)
    found: list[list[Timing]] = [[] for _ in every]
    with ThreadPoolExecutor(len(every)) as threads:
        for number in range(1 + rounds):
            relays = [_Relay() for _ in every]
            runs = [threads.submit(r.run, fast, options) for r, fast in zip(relays, every, strict=True)]
            try:
                while running := [relay for relay in relays if not relay.ended]:
                    for relay in order.sample(running, len(running)):
                        relay.go_on()
            finally:
                for relay in relays:
                    relay.give_up()
            for relay, run, timings in zip(relays, runs, found, strict=True):
                run.result()
                first, *others = relay.seconds
                if number:
                    timings.append(Timing(first, rows * len(others) / sum(others)))
    return found


def ratios(timings: Sequence[Timing], others: Sequence[Timing]) -> list[Timing]:
    """Of each run to the other one of the same round."""
    return [
        Timing(own.ttft_s / other.ttft_s, own.tokens_per_s / other.tokens_per_s)
        for own, other in zip(timings, others, strict=True)
    ]


def medians(timings: Sequence[Timing]) -> Timing:
    """Both medians, each on its own."""
    return Timing(median(t.ttft_s for t in timings), median(t.tokens_per_s for t in timings))
