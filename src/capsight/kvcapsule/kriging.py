"""Predict tokens from other tokens of their block, and choose the ones worth keeping (our design).

Every channel of a block is seen as a draw of a vector of N tokens with second moment C. The best
linear prediction of all tokens from the kept ones S is `C[:, S] C[S, S]^-1 x_S` (conditional
Gaussian mean; kriging, in geostatistics). G groups (keys, values) may have a C each.
"""

from __future__ import annotations

import torch
from torch import Tensor


def prediction_weights(covariance: Tensor, kept: Tensor) -> Tensor:
    """Weights that predict every token of a block from its kept tokens.

    Args:
        covariance: float `[G, N, N]`, symmetric positive definite.
        kept: int64 `[M, r]`, kept positions of each block.

    Returns:
        `[M, G, N, r]`; rows of kept tokens are unit vectors up to rounding.
    """
    rows = covariance[:, kept]  # [G, M, r, N]
    square = rows.gather(3, kept[None, :, None, :].expand(*rows.shape[:3], -1))  # [G, M, r, r]
    factor = torch.linalg.cholesky(square)
    return torch.cholesky_solve(rows, factor).mT.transpose(0, 1)


def greedy_selection(covariance: Tensor, gram: Tensor, count: int) -> Tensor:
    """Per block, keep `count` tokens, each time the one that those kept so far predict worst.

    The residual energies of all tokens are updated after each choice by rank-one corrections of
    C and of the block's Gram matrix, so the only Python loop is over the `count` choices.

    Args:
        covariance: float `[G, N, N]`, symmetric positive definite.
        gram: float `[M, G, N, N]`, token Gram matrices x x^T of each block.
        count: tokens to keep (r).

    Returns:
        int64 `[M, r]`, ascending positions.
    """
    blocks, groups, size, _ = gram.shape
    energy = gram.diagonal(dim1=-2, dim2=-1).clone()  # [M, G, N] residual energy of each token
    # After j choices: residual C = C - A diag(d) A^T, residual Gram = gram - A B^T - B A^T.
    a = gram.new_zeros(blocks, groups, size, count)
    b = torch.zeros_like(a)
    d = gram.new_zeros(blocks, groups, count)
    chosen = torch.zeros(blocks, size, dtype=torch.bool, device=gram.device)
    for j in range(count):
        pivot = energy.sum(1).masked_fill(chosen, -torch.inf).argmax(1)  # [M]
        chosen.scatter_(1, pivot[:, None], True)
        at = pivot[:, None, None].expand(-1, groups, 1)  # [M, G, 1]
        row = at[..., None].expand(-1, -1, 1, j)
        a_at, b_at = a[..., :j].gather(2, row), b[..., :j].gather(2, row)  # [M, G, 1, j]
        column = covariance[:, pivot].transpose(0, 1) - (a[..., :j] @ (a_at * d[:, :, None, :j]).mT)[..., 0]
        d[..., j] = column.gather(2, at)[..., 0]
        weight = column / d[..., j, None]  # [M, G, N] how much of the pivot's residual each token takes
        cross = gram.gather(3, at[..., None].expand(-1, -1, size, 1))
        cross = (cross - a[..., :j] @ b_at.mT - b[..., :j] @ a_at.mT)[..., 0]  # [M, G, N]
        own = cross.gather(2, at)  # [M, G, 1]
        energy += weight * (weight * own - 2 * cross)
        a[..., j] = weight
        b[..., j] = cross - 0.5 * own * weight
    return chosen.nonzero()[:, 1].view(blocks, count)


def pivoted_cholesky(covariance: Tensor, count: int) -> Tensor:
    """The `count` tokens that predict the others best on average: greedy on the residual variance.

    Args:
        covariance: float `[N, N]`, symmetric positive definite.
        count: tokens to keep (r).

    Returns:
        int64 `[r]`, ascending positions.
    """
    residual = covariance.clone()
    chosen = torch.zeros(len(covariance), dtype=torch.bool)
    for _ in range(count):
        variance = residual.diagonal().masked_fill(chosen, -torch.inf)
        pivot = int(variance.argmax())
        chosen[pivot] = True
        column = residual[:, pivot]
        residual = residual - torch.outer(column, column) / column[pivot]
    return chosen.nonzero()[:, 0]


def with_nugget(covariance: Tensor, ridge: float) -> Tensor:
    """`covariance` `[..., N, N]` plus `ridge` x its mean variance on the diagonal: keeps it invertible."""
    mean_variance = covariance.diagonal(dim1=-2, dim2=-1).mean(-1)
    nugget = ridge * torch.where(mean_variance > 0, mean_variance, 1.0)
    return covariance + nugget[..., None, None] * torch.eye(covariance.shape[-1], dtype=covariance.dtype)
