"""Predict tokens from other tokens of their block, and choose the ones worth keeping (our design).

Every channel of a block is seen as a draw of a vector of N tokens with second moment C. The best
linear prediction of all tokens from the kept ones S is `C[:, S] C[S, S]^-1 x_S` (conditional
Gaussian mean; kriging, in geostatistics). G groups (keys, values) may have a C each.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


def prediction_weights(covariance: Tensor, positions: Tensor, wanted: Tensor | None = None) -> Tensor:
    """Weights that predict tokens of a block from its kept tokens.

    Args:
        covariance: float `[G, N, N]`, symmetric positive definite.
        positions: int64 `[M, r]`, kept positions of each block.
        wanted: int64 `[M, T]`, positions to predict; None for all, in order (T = N).

    Returns:
        `[M, G, T, r]`; rows of kept tokens are unit vectors up to rounding.
    """
    rows = covariance[:, positions]  # [G, M, r, N]
    square = rows.gather(3, positions[None, :, None, :].expand(*rows.shape[:3], -1))  # [G, M, r, r]
    if wanted is not None:
        rows = rows.gather(3, wanted[None, :, None, :].expand(*rows.shape[:3], -1))  # [G, M, r, T]
    factor = torch.linalg.cholesky(square)
    return torch.cholesky_solve(rows, factor).mT.transpose(0, 1)


class Selection(NamedTuple):
    """What `greedy_selection` chose in M blocks of each of L layers.

    Attributes:
        order: int64 `[L, M, r]`, kept positions in the order in which they were chosen.
        factor: float `[L, M, G, N, r]`, column j being how much of the j-th residual each token takes;
            the rows of the kept tokens, in order, are unit lower triangular.
    """

    order: Tensor
    factor: Tensor

    def layer(self, index: int) -> Selection:
        """That of one layer (L = 1)."""
        return Selection(*(x[index, None] for x in self))

    def first(self, count: int) -> Selection:
        """What it would be with only the first `count` choices: none depends on a later one."""
        return Selection(*(x[..., :count] for x in self))

    def weights(self, wanted: Tensor) -> Tensor:
        """Weights that predict positions `wanted` (int64 `[L, M, T]`) from those in `order`.

        One triangular solve, since C[:, S] C[S, S]^-1 = F F[S]^-1 for the factor F.

        Returns:
            `[L, M, G, T, r]`.
        """
        triangle, rest = self._rows(self.order), self._rows(wanted)
        return torch.linalg.solve_triangular(triangle, rest, upper=False, left=False, unitriangular=True)

    def _rows(self, at: Tensor) -> Tensor:
        index = at[:, :, None, :, None].expand(*self.factor.shape[:3], -1, self.factor.shape[4])
        return self.factor.gather(3, index)


def greedy_selection(covariance: Tensor, gram: Tensor, count: int) -> Selection:
    """Per block, keep `count` tokens, each time the one that those kept so far predict worst.

    Only columns of the chosen tokens are ever needed of the residual C and of the residual Gram
    matrix of a block; both follow from the columns before (as in a pivoted Cholesky decomposition).
    The only Python loop is over the `count` choices, for the blocks of all layers at once.

    Args:
        covariance: float `[L, G, N, N]`, symmetric positive definite, one per layer and group.
        gram: float `[L, M, G, N, N]`, token Gram matrices x x^T of each block.
        count: tokens to keep (r).
    """
    layers, blocks, groups, size, _ = gram.shape
    total = layers * blocks * groups
    device = gram.device
    energy = gram.diagonal(dim1=-2, dim2=-1).sum(2).flatten(0, 1)  # [L * M, N] residual energy of each token
    # With w, g the columns chosen so far (g = residual Gram's, b = g - w g[p] / 2, v = residual variance):
    # residual C = C - sum v w w^T, residual Gram = Gram - sum (w b^T + b w^T).
    past = gram.new_empty(total, count, 2, size)  # w and b
    variance = gram.new_zeros(total, count, 2)  # v for w, 0 for b
    block = torch.arange(total, device=device) * size
    layer = torch.arange(layers * groups, device=device).view(layers, 1, groups) * size
    layer = layer.expand(-1, blocks, -1).flatten()
    c_rows, gram_rows = covariance.reshape(-1, size), gram.reshape(-1, size)
    order = []
    for j in range(count):
        pivot = energy.argmax(1)  # [L * M]
        order.append(pivot)
        energy.scatter_(1, pivot[:, None], -torch.inf)
        at = pivot.repeat_interleave(groups)  # [L * M * G]
        # of the chosen tokens, the columns of residual C and of residual Gram: [L * M * G, 2, N]
        columns = torch.stack((c_rows.index_select(0, layer + at), gram_rows.index_select(0, block + at)), 1)
        if j:
            row = past[:, :j].gather(3, at[:, None, None, None].expand(-1, j, 2, -1))[..., 0]
            sides = torch.stack((row * variance[:, :j], row.flip(2)), 1).flatten(2)  # [L * M * G, 2, 2 j]
            columns.baddbmm_(sides, past[:, :j].flatten(1, 2), alpha=-1)
        at_pivot = columns.gather(2, at[:, None, None].expand(-1, 2, -1))  # [L * M * G, 2, 1]
        w = columns[:, 0] / at_pivot[:, 0]
        b = torch.addcmul(columns[:, 1], w, at_pivot[:, 1], value=-0.5)
        energy.sub_((w * b).view(-1, groups, size).sum(1), alpha=2)
        past[:, j, 0], past[:, j, 1], variance[:, j, 0] = w, b, at_pivot[:, 0, 0]
    factor = past[:, :, 0].mT.unflatten(0, (layers, blocks, groups))
    return Selection(torch.stack(order, 1).view(layers, blocks, count), factor)


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
