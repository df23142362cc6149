"""Axes of the joint codec in whole steps: an axis has a step in keys of a layer, and one in its values."""

from __future__ import annotations

import torch
from torch import Tensor

AXIS_BITS = 8


def in_steps(axes: Tensor, least: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """One layer's axes `[K, 2, H, D]` as int8, and their steps float32 `[2, K]`.

    Args:
        axes: the numbers.
        least: float32 `[2, K]`, steps that need not be finer; None for the finest.
    """
    top = 2 ** (AXIS_BITS - 1) - 1
    steps = axes.float().abs().amax((2, 3)) / top  # [K, 2]
    if least is not None:
        steps = torch.maximum(steps, least.T)
    integers = (axes.float() / steps.clamp_min(1e-30)[:, :, None, None]).round()
    return integers.clamp_(-top, top).to(torch.int8), steps.T.contiguous()


def numbers(axes: Tensor, steps: Tensor, dtype: torch.dtype) -> Tensor:
    """The axes `[K, 2, H, D]` of what `in_steps` gave; memory lies as that of `axes`."""
    return axes * steps.T[:, :, None, None].to(dtype)


def coordinates_together(axes: Tensor) -> Tensor:
    """The same axes `[K, 2, H, D]`, the K of a channel side by side in memory that holds nothing else."""
    return axes.movedim(0, -1).clone(memory_format=torch.contiguous_format).movedim(-1, 0)
