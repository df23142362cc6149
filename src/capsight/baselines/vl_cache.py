"""VL-Cache-style eviction: layer budgets, accumulated post-vision attention (arXiv 2410.23317)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from capsight.baselines.choice import allocate, runs_by_row, top_per_head
from capsight.baselines.observing import Observation, ObservingBaseline, at_runs
from capsight.baselines.seen import Seen
from capsight.kvcapsule.plan import Run

THRESHOLD = 0.01  # of a query's largest weight: smaller ones count as zero
LEAST = 0.01  # of a row's vision tokens, kept in every layer
WINDOW = 32  # queries to look at where fewer follow the images


class VLCache(ObservingBaseline):
    """After VL-Cache, https://arxiv.org/abs/2410.23317.

    A layer's budget is in proportion to the density of its post-vision attention (share of weights above
    1 % of the query's largest); within a layer the tokens with the most accumulated post-vision attention
    stay. Differs from the original: vision tokens only, logical positions, no share reserved for recent
    tokens (the recent text is exact). In protocol `after` only a delimiter follows the images when they
    are compressed, so the last 32 prefilled tokens stand in for the missing post-vision queries.
    """

    name = "vl-cache"
    joint = True

    def look(self, seen: Seen, runs: Sequence[Run]) -> Observation:
        """Accumulated attention of the post-vision queries, and its density by row."""
        length, offset = seen.key.shape[2], seen.key.shape[2] - seen.query.shape[2]
        ends = {run.row: run.start + self.block_size for run in runs}
        firsts = [
            max(min(ends.get(row, length), length - WINDOW), offset, 0) for row in range(len(seen.pads))
        ]
        scores = at_runs(seen.mean(firsts), runs, self.block_size)
        return Observation(scores, _density(seen, firsts))

    def choose(self, observed: Sequence[Observation], runs: Sequence[Run]) -> list[Tensor]:
        """Share a row's budget out over the layers, then keep each head's highest scores."""
        counts: list[dict[int, int]] = [{} for _ in observed]
        for row, indices in runs_by_row(runs).items():
            tokens = len(indices) * self.block_size
            budget = self.kept * len(indices)
            weights = [float(layer.density[row]) for layer in observed if layer.density is not None]
            floor = min(max(round(LEAST * tokens), 1), budget)
            for layer, count in enumerate(allocate(weights, budget * len(observed), floor, tokens)):
                counts[layer][row] = count
        return [top_per_head(layer.scores, runs, counts[i]) for i, layer in enumerate(observed)]


def _density(seen: Seen, firsts: Sequence[int]) -> Tensor:
    """Share of weights above the threshold among those that causality allows: float32 `[B]`."""
    pads = torch.tensor(seen.pads, device=seen.key.device)[:, None]
    starts = torch.tensor(firsts, device=seen.key.device)[:, None]
    above = torch.zeros(len(seen.pads), device=seen.key.device)
    allowed = torch.zeros_like(above)
    for positions, weights in seen.weights(min(firsts)):
        counts = seen.real(positions) & (positions >= starts)  # [B, q]
        large = weights >= THRESHOLD * weights.amax(-1, keepdim=True)
        above += (large.sum(-1).float().mean((1, 2)) * counts).sum(1)
        allowed += ((positions - pads + 1) * counts).sum(1)
    return above / allowed.clamp_min(1)
