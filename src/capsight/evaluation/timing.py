"""Times generation: time to first token and decode speed, measured inside one `generate` call."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from random import Random
from statistics import median
from typing import Any, Protocol

import torch
from transformers import StoppingCriteria, StoppingCriteriaList


@dataclass(frozen=True, slots=True)
class Timing:
    """One run, or medians over several.

    Attributes:
        ttft_s: seconds from the call to the first new token, image encoding and prefill included.
        tokens_per_s: new tokens per second after the first, over all rows of the batch.
    """

    ttft_s: float
    tokens_per_s: float


TURNS, TURN = 4, 8
"""Turns of a generation in `time_together`, and tokens of each that are timed."""

NEW = TURNS * (1 + TURN)
"""Tokens that such a generation has in all."""


class Generates(Protocol):
    """What is timed in turns: a `FastModel`, or what calls one."""

    def generate(self, **options: Any) -> Any:
        """As transformers' own."""


class _Clock(StoppingCriteria):
    """Never stops; notes when each new token was there."""

    def __init__(self) -> None:
        self.ticks: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        if input_ids.is_cuda:
            torch.cuda.synchronize()
        self.ticks.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def time_once(fast: Generates, inputs: Mapping[str, Any], new_tokens: int) -> Timing:
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


@dataclass(frozen=True, slots=True)
class Round:
    """One generation, made in turns.

    Attributes:
        ttft_s: seconds from the call to the first new token.
        rates: new tokens per second over all rows, turn by turn, the first token of each left out.
    """

    ttft_s: float
    rates: tuple[float, ...]


def time_together(
    every: Sequence[Callable[[], AbstractContextManager[Generates]]], inputs: Mapping[str, Any], rounds: int
) -> list[list[Round]]:
    """Have several generate in turns of a few tokens, in random order, so that all see the same machine.

    What others do there changes from second to second. A turn goes on with the cache of the one before; the
    end token stops nothing.

    Args:
        every: what each enters for its turns.
        inputs: of a processor.
        rounds: how many generations of each count, after one that warms up.

    Returns:
        The rounds of each.
    """
    order, found = Random(0), [list[Round]() for _ in every]
    for number in range(1 + rounds):
        asked, ticks = [inputs for _ in every], [list[list[float]]() for _ in every]
        for _ in range(TURNS):
            for i in order.sample(range(len(every)), len(every)):
                with every[i]() as fast:
                    asked[i], times = _turn(fast, asked[i])
                ticks[i].append(times)
        for own, turns in zip(found, ticks, strict=True):
            tokens = inputs["input_ids"].shape[0] * TURN
            if number:
                own.append(Round(turns[0][0], tuple(tokens / (times[-1] - times[0]) for times in turns)))
    return found


def _turn(fast: Generates, asked: Mapping[str, Any]) -> tuple[dict[str, Any], list[float]]:
    """What is asked next, and the seconds until each new token."""
    clock, new = _Clock(), 1 + TURN
    began = time.perf_counter()
    done = fast.generate(
        **asked,
        max_new_tokens=new,
        min_new_tokens=new,
        do_sample=False,
        return_dict_in_generate=True,
        stopping_criteria=StoppingCriteriaList([clock]),
    )
    mask = torch.nn.functional.pad(asked["attention_mask"], (0, new), value=1)
    then = {"input_ids": done.sequences, "attention_mask": mask, "past_key_values": done.past_key_values}
    return then, [tick - began for tick in clock.ticks]


def summary(rounds: Sequence[Round], others: Sequence[Round]) -> tuple[Timing, Timing]:
    """Medians, and the medians of ratios to the same rounds and turns of others."""

    def middle(first: Iterable[float], rates: Iterable[float]) -> Timing:
        return Timing(median(first), median(rates))

    pairs = [*zip(rounds, others, strict=True)]
    return (
        middle((r.ttft_s for r in rounds), (rate for r in rounds for rate in r.rates)),
        middle(
            (own.ttft_s / other.ttft_s for own, other in pairs),
            (a / b for own, other in pairs for a, b in zip(own.rates, other.rates, strict=True)),
        ),
    )


def medians(timings: Sequence[Timing]) -> Timing:
    """Both medians, each on its own."""
    return Timing(median(t.ttft_s for t in timings), median(t.tokens_per_s for t in timings))
