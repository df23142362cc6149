"""Tokens chosen by where they stand, whatever the image shows: at equal distances, or the first and last."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from capsight.baselines.scored import ScoredBaseline
from capsight.kvcapsule.plan import Run

SINKS = 4  # initial tokens that the paper found to be enough


class StreamingLLM(ScoredBaseline):
    """After StreamingLLM, https://arxiv.org/abs/2309.17453.

    Differs from the original: sinks and window are counted in vision tokens (text is exact and costs
    nothing here), and tokens keep their logical positions instead of positions inside the cache.
    """

    name = "streaming-llm"

    def scores(self, keys: Tensor, values: Tensor, runs: Sequence[Run]) -> Tensor:
        """The later the higher, the first four vision tokens of a row above all."""
        starts = torch.tensor([run.start for run in runs], device=keys.device)
        positions = starts[:, None] + torch.arange(self.block_size, device=keys.device)  # [M, N]
        scores = positions.float()
        first = {run.row: run.start for run in reversed(runs)}
        sinks = positions - torch.tensor([first[run.row] for run in runs], device=keys.device)[:, None]
        scores[sinks < SINKS] = torch.inf
        return scores[:, None].expand(keys.shape[:3])


class UniformSubsample(ScoredBaseline):
    """Keeps r positions of every run at equal distances, the same in all layers and heads (no paper)."""

    name = "uniform"

    def scores(self, keys: Tensor, values: Tensor, runs: Sequence[Run]) -> Tensor:
        """1 for the middle of each of r equal parts of a run, 0 for all other tokens."""
        scores = keys.new_zeros(keys.shape[:3])
        scores[:, :, ((torch.arange(self.kept) + 0.5) * self.block_size / self.kept).long()] = 1
        return scores
