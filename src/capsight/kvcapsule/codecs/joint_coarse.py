"""Coarse axes of the joint codec: rounding leaves them at an angle, and latents lose by it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from capsight.kvcapsule.codecs.levels import GROUP

_FEW = 63  # largest integer of an axis that is not as fine as it can be
_RIDGE = 1e-6  # for axes that are nothing but zeros


def is_coarse(axes: Tensor) -> bool:
    """Whether some axes of one layer, int8 `[K, 2, H, D]`, are in fewer bits than they could be."""
    largest = axes.flatten(1).abs().amax(1)
    return bool(((largest > 0) & (largest <= _FEW)).any())


def least_squares(sums: Tensor, codecs: Sequence[Any]) -> Tensor:
    """Latents `[T, R]` that give most back: of sums over layers, what coarse axes count twice is taken out.

    Args:
        sums: `[T, R]`, products of tokens and axes.
        codecs: the joint codecs of all layers; the first one keeps the inverse of the axes' inner products.
    """
    first = codecs[0]
    if not is_coarse(first.axes):
        return sums
    if first.inverse is None or first.inverse.device != sums.device:
        parts = (codec.unit_axes().to(sums.device) for codec in codecs)
        products = torch.stack([part @ part.T for part in parts]).sum(0, dtype=torch.float64)
        ridge = _RIDGE * torch.eye(len(products), dtype=torch.float64, device=products.device)
        first.inverse = torch.linalg.inv(products + ridge).float()
    return sums @ first.inverse


def typical_loss(first: Any) -> float:
    """Share of the variance that latents of images like those of calibration lose.

    Axes lose that are not there, and the rounding of others.

    Args:
        first: the joint codec of the first layer; `lost` and `typical` are of all layers.
    """
    variance = first.lost[:, 0] / GROUP  # of a coordinate
    variances = variance.repeat_interleave(GROUP)[: first.levels.rank]
    steps = first.steps[0] * first.weight[0]  # of axes of length 1
    rounding = (first.full_nbytes // 2 * steps.square() / 12).clamp_max(1)  # of an axis
    return float(first.typical) + float(1 - (variances * (1 - rounding)).sum() / first.lost[:, 0].sum())
