"""Rules that pick the fixed positions of kept keys: pure functions of one layer's calibration statistics.

Each takes the keys' second moment C (float `[N, N]`, positive definite), the mean attention that every
position gets (float `[N]`) and the number of positions to keep (r). It gives int64 `[r]`, ascending.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from capsight.kvcapsule.codecs.kriging import pivoted_cholesky

Rule = Callable[[Tensor, Tensor, int], Tensor]


def cholesky(covariance: Tensor, attention: Tensor, kept: int) -> Tensor:
    """The positions that predict the others best (pivoted Cholesky); what the `static` codec does."""
    return pivoted_cholesky(covariance, kept)


def strided(covariance: Tensor, attention: Tensor, kept: int) -> Tensor:
    """Evenly spread positions."""
    return ((torch.arange(kept) + 0.5) * len(covariance) / kept).long()


def farthest_point(covariance: Tensor, attention: Tensor, kept: int) -> Tensor:
    """Each next position is the one farthest from those chosen; the first has the largest variance.

    The squared distance of two tokens is that of their keys on average: C[i, i] + C[j, j] - 2 C[i, j].
    """
    variance = covariance.diagonal()
    squared = variance[:, None] + variance - 2 * covariance  # [N, N]
    chosen = [int(variance.argmax())]
    nearest = squared[chosen[0]].clone()
    for _ in range(kept - 1):
        nearest[chosen] = -torch.inf
        chosen.append(int(nearest.argmax()))
        nearest = nearest.minimum(squared[chosen[-1]])
    return torch.tensor(sorted(chosen))


def attention_top(covariance: Tensor, attention: Tensor, kept: int) -> Tensor:
    """The positions that got most attention in calibration prefills."""
    return attention.topk(kept).indices.sort().values


RULES: dict[str, Rule] = {
    "pivoted Cholesky": cholesky,
    "strided": strided,
    "farthest point": farthest_point,
    "most attention in prefill": attention_top,
}
