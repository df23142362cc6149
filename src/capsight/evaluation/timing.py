"""Times generation: time to first token and decode speed, measured inside one `generate` call."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
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


def medians(timings: Sequence[Timing]) -> Timing:
    """Both medians, each on its own."""
    return Timing(median(t.ttft_s for t in timings), median(t.tokens_per_s for t in timings))
