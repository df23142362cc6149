"""Uniform subsample: every (N / r)-th vision token, whatever the image shows. The floor for all others."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from capsight.baselines.scored import ScoredBaseline
from capsight.kvcapsule.plan import Run


class UniformSubsample(ScoredBaseline):
    """Keeps r positions of every run at equal distances, the same in all layers and heads (no paper)."""

    name = "uniform"

    def scores(self, keys: Tensor, values: Tensor, runs: Sequence[Run]) -> Tensor:
        """1 for the middle of each of r equal parts of a run, 0 for all other tokens."""
        scores = keys.new_zeros(keys.shape[:3])
        scores[:, :, ((torch.arange(self.kept) + 0.5) * self.block_size / self.kept).long()] = 1
        return scores
