"""CUR-style eviction: approximate leverage scores of keys and values (arXiv 2509.15038)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from capsight.baselines.scored import ScoredBaseline
from capsight.kvcapsule.plan import Run

WINDOW = 16  # tokens over which norms are compared, as in kvpress


class CUREviction(ScoredBaseline):
    """After CUR KV compression, https://arxiv.org/abs/2509.15038, in the form of kvpress' `CURPress`.

    The score of a token is the product of the squared norms of its key and of its value, each divided by
    the sum over its window of 16 neighbours; each head keeps the highest of all images of a row.
    Differs from `CURPress`: vision tokens only (windows are counted from the start of a run), no
    protected sinks (the first tokens of a prompt are text, which is exact), logical positions.
    """

    name = "cur"

    def scores(self, keys: Tensor, values: Tensor, runs: Sequence[Run]) -> Tensor:
        """Product of local leverages, `[M, H, N]`."""
        return _local(keys) * _local(values)


def _local(x: Tensor) -> Tensor:
    """Squared norms of `[M, H, N, D]` as shares of their window: float32 `[M, H, N]`."""
    norms = x.float().square().sum(-1)
    parts = [part / part.sum(-1, keepdim=True).clamp_min(1e-12) for part in norms.split(WINDOW, -1)]
    return torch.cat(parts, -1)
