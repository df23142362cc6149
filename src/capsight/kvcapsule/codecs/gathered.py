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
    def none(cls, like: Tensor, tokens: int, rank: int) -> Self:
        """Nothing yet, of so many tokens, where float32 `like` lies."""
        return cls(like.new_zeros(tokens, rank), like.new_zeros(()))

    def plus(self, x: Tensor, energy: Tensor, axes: Tensor) -> Self:
        """With one layer's keys and values.

        Args:
            x: `[T, F]`, W (x - mean), in the dtype that products are made in.
            energy: the sum of its squares.
            axes: `[R, F]`, this layer's columns of U^T.
        """
        latents, own = self.latents, axes.to(x.dtype).T
        if x.dtype == latents.dtype and latents.device == x.device:
            latents.addmm_(x, own)
        else:
            latents.add_((x @ own).to(latents))
        return self._replace(energy=self.energy + energy.to(self.energy.device))

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
