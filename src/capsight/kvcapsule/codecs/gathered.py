"""`Gathered`: latents that layers add to, and whether their images are like those of the fit."""

from __future__ import annotations

import warnings
from typing import NamedTuple, Self

from torch import Tensor

from capsight.errors import UnlikeCalibrationWarning

_UNLIKE = 4.0  # times the loss on calibration images from which on images are said to be unlike them
_LEAST = 0.02  # loss up to which none are


class Gathered(NamedTuple):
    """What layers have added up of T tokens.

    Attributes:
        latents: float32 `[T, R]`.
        energy: float32 `[]`, sum of the squares of W (x - mean).
    """

    latents: Tensor
    energy: Tensor

    @classmethod
    def none(cls, like: Tensor, rank: int) -> Self:
        """Nothing yet, of as many tokens and where `like` `[T, ...]` lies."""
        return cls(like.new_zeros(len(like), rank), like.new_zeros(()))

    def plus(self, x: Tensor, axes: Tensor, square: float) -> Self:
        """With one layer's keys or values.

        Args:
            x: float32 `[T, H, D]`, less their mean.
            axes: float32 `[R, H, D]`, of them.
            square: of their weight.
        """
        latents, energy = self
        flat, away = x.flatten(1), latents.device != x.device
        if away:
            latents.add_((flat @ axes.flatten(1).T).mul_(square).to(latents.device))
        else:
            latents.addmm_(flat, axes.flatten(1).T, alpha=square)  # W^2 (x - mean) U
        flat = flat.flatten()
        return type(self)(latents, energy + square * flat.dot(flat).to(energy.device))

    def compare(self, typical: float) -> None:
        """Say so where images lose far more of their variance than those of calibration did: `typical`."""
        lost = float(1 - self.latents.square().sum() / self.energy.clamp_min(1e-30))
        if lost > max(_UNLIKE * typical, _LEAST):
            warnings.warn(
                f"these images are unlike those the capsule was fitted to: latents lose {lost:.0%} of "
                f"their variance, {typical:.1%} in calibration; fit with such samples, or retain more",
                UnlikeCalibrationWarning,
                stacklevel=2,
            )
