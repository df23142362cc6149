"""From scores to kept tokens: the top of every row and head, of a whole row, and budgets of layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from capsight.kvcapsule.plan import Run


def runs_by_row(runs: Sequence[Run]) -> dict[int, list[int]]:
    """Indices of the runs of every row that has some."""
    by_row: dict[int, list[int]] = {}
    for index, run in enumerate(runs):
        by_row.setdefault(run.row, []).append(index)
    return by_row


def top_per_head(scores: Tensor, runs: Sequence[Run], counts: Mapping[int, int]) -> Tensor:
    """Keep the tokens with the highest scores, each KV head on its own; earlier tokens win ties.

    Args:
        scores: float `[M, H, N]` of the tokens of M runs.
        runs: where the runs lie.
        counts: tokens to keep of all runs of a row together, by row.

    Returns:
        bool `[M, H, N]`.
    """
    keep = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
    for row, indices in runs_by_row(runs).items():
        flat = scores[indices].transpose(0, 1).flatten(1)  # [H, m * N]
        best = flat.argsort(dim=1, descending=True, stable=True)[:, : counts[row]]
        chosen = torch.zeros(flat.shape, dtype=torch.bool, device=flat.device).scatter(1, best, True)
        keep[indices] = chosen.view(scores.shape[1], len(indices), -1).transpose(0, 1)
    return keep


def top_overall(scores: Tensor, runs: Sequence[Run], counts: Mapping[int, int]) -> Tensor:
    """Keep the highest scores of a row over all layers, heads and tokens; earlier ones win ties.

    Args:
        scores: float `[L, M, H, N]` of L layers.
        runs: where the M runs lie.
        counts: tokens to keep by row, on average per layer and head.

    Returns:
        bool `[L, M, H, N]`.
    """
    keep = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
    for row, indices in runs_by_row(runs).items():
        flat = scores[:, indices].flatten()
        best = flat.argsort(descending=True, stable=True)[: counts[row] * scores.shape[0] * scores.shape[2]]
        chosen = torch.zeros(flat.shape, dtype=torch.bool, device=flat.device).scatter(0, best, True)
        keep[:, indices] = chosen.view(scores.shape[0], len(indices), *scores.shape[2:])
    return keep


def allocate(weights: Sequence[float], total: int, floor: int, cap: int) -> list[int]:
    """Whole numbers in proportion to `weights`, each in [floor, cap], that add up to `total`.

    Args:
        weights: one for each layer, at least 0.
        total: what to give out, between `floor` and `cap` on average.
        floor: least for each.
        cap: most for each.
    """
    low, high = 0.0, total * len(weights) / max(min((w for w in weights if w > 0), default=1.0), 1e-12)
    for _ in range(100):  # bisection: the sum of clipped shares grows with the scale
        scale = (low + high) / 2
        small = sum(min(max(scale * w, floor), cap) for w in weights) < total
        low, high = (scale, high) if small else (low, scale)
    shares = [min(max(high * w, floor), cap) for w in weights]
    counts = [int(share) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda i: counts[i] - shares[i])
    while sum(counts) != total:
        step = 1 if sum(counts) < total else -1
        for i in by_remainder:
            if sum(counts) != total and floor <= counts[i] + step <= cap:
                counts[i] += step
    return counts
