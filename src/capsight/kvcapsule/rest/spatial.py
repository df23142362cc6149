"""A cosine transform over the grid of an image: what neighbouring tokens share goes into few numbers.

DCT-II, orthonormal: Ahmed, Natarajan and Rao, 1974; as JPEG has it for pixels, here for each coordinate of
latents. Blank paper and sharp print are better left as they are, so whoever codes tries both.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from capsight.layout import Grid


def transformed(latents: Tensor, grids: Sequence[Grid], back: bool = False) -> Tensor:
    """Cosine coefficients of latents, or the latents of coefficients.

    Args:
        latents: `[T, R]`, tokens of blocks one after another, row-major.
        grids: (t, h, w) of each block, T tokens in all.
        back: whether to go back.
    """
    blocks = []
    for block, grid in zip(latents.split([math.prod(grid) for grid in grids]), grids, strict=True):
        x = block.view(*grid, -1)
        for axis, count in enumerate(grid):
            cosines = _cosines(count).to(x)
            x = torch.tensordot(cosines.T if back else cosines, x.movedim(axis, 0), 1).movedim(0, axis)
        blocks.append(x.reshape(block.shape))
    return torch.cat(blocks)


def _cosines(count: int) -> Tensor:
    """The transform of so many numbers: float64 `[n, n]`, orthonormal."""
    place = torch.arange(count, dtype=torch.float64)
    rows = (math.pi / count * torch.outer(place, place + 0.5)).cos() * math.sqrt(2 / count)
    rows[0] /= math.sqrt(2)
    return rows
