"""Whitening: channels of a head turned and scaled until none is larger than another (our choice).

The squared length of a whitened token is its Mahalanobis distance from the mean. Directions in which
tokens seldom differ count as much as those in which they always do: what tells one character from another is
small beside what tells ink from paper.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from capsight.kvcapsule.codecs.kriging import with_nugget

RIDGE = 1e-3
"""Variance added to every channel, as a fraction of the mean variance."""


def whitening(covariance: Tensor) -> Tensor:
    """The inverse Cholesky factor W of covariances, so that W (x - mean) is white.

    Args:
        covariance: float64 `[H, D, D]`, positive semidefinite.

    Returns:
        float64 `[H, D (D + 1) / 2]`, lower triangles, packed row by row.
    """
    factor = torch.linalg.cholesky(with_nugget(covariance, RIDGE))
    identity = torch.eye(covariance.shape[-1], dtype=covariance.dtype).expand_as(factor)
    inverse = torch.linalg.solve_triangular(factor, identity, upper=False)
    rows, cols = torch.tril_indices(*covariance.shape[-2:])
    return inverse[..., rows, cols]


def whitened(keys: Tensor, values: Tensor, packed: Tensor) -> Tensor:
    """Centred keys and values `[M, H, N, D]` times W^T: float32 `[2, M, H, N, D]`.

    `packed` is `[2, H, D (D + 1) / 2]`. The result is a view of `[2, H, M, N, D]`. Nothing is copied where
    keys and values are views of `[M, N, H, D]`, as caches hold them.
    """
    blocks, heads, size, dim = keys.shape
    turned = _square(packed.flatten(0, 1), dim).view(2, heads, dim, dim).mT
    white = torch.empty(2, heads, blocks * size, dim, device=keys.device)
    for x, w, out in zip((keys, values), turned, white, strict=True):
        torch.bmm(x.float().transpose(0, 1).flatten(1, 2), w, out=out)
    return white.unflatten(2, (blocks, size)).transpose(1, 2)


def deviation(packed: Tensor, size: int) -> Tensor:
    """Standard deviations of the channels that `packed` whitens: float32 `[H, D]` with D = `size`."""
    eye = torch.eye(size, device=packed.device).expand(len(packed), -1, -1)
    return torch.linalg.solve_triangular(_square(packed, size), eye, upper=False).norm(dim=-1)


def is_whitening(packed: Tensor, size: int) -> bool:
    """Whether `packed` `[..., D (D + 1) / 2]` with D = `size` has positive diagonals."""
    last = torch.arange(1, size + 1, device=packed.device).cumsum(0) - 1  # of each row
    return bool((packed[..., last] > 0).all())


def _square(packed: Tensor, size: int) -> Tensor:
    """The lower triangles as matrices: float32 `[H, D, D]`."""
    square = torch.zeros(len(packed), size * size, device=packed.device)
    square[:, _lower(size, packed.device)] = packed.float()
    return square.view(-1, size, size)


@lru_cache(maxsize=8)
def _lower(size: int, device: torch.device) -> Tensor:
    """Where in a flattened `[D, D]` the packed lower triangle goes: int64 `[D (D + 1) / 2]`."""
    rows, cols = torch.tril_indices(size, size)
    return (rows * size + cols).to(device)
