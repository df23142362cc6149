"""`Gathered`: latents that layers add to, and whether their images are like those of the fit."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Self

import torch
from torch import Tensor

from capsight.errors import UnlikeCalibrationWarning

_UNLIKE = 4.0  # times the loss on calibration images from which on images are said to be unlike them
_LEAST = 0.02  # loss up to which none are
_TOGETHER = 4  # layers that are projected in one product


@dataclass(slots=True, eq=False)
class Gathered:
    """What layers have added up of T tokens.

    Attributes:
        energy: float32 `[]`, sum of the squares of W (x - mean).
    """

    energy: Tensor
    _latents: Tensor  # float32 [T, R]
    _layers: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # not yet added

    @classmethod
    def none(cls, like: Tensor, tokens: int, rank: int) -> Self:
        """Nothing yet, of so many tokens, where float32 `like` lies."""
        return cls(like.new_zeros(()), like.new_zeros(tokens, rank))

    def add(self, x: Tensor, energy: Tensor, axes: Tensor) -> None:
        """Take one layer's keys and values.

        Args:
            x: `[T, F]`, W (x - mean), in the dtype that products are made in.
            energy: the sum of its squares.
            axes: `[R, F]`, this layer's columns of U^T.
        """
        if self._layers and self._layers[0][0].device != x.device:
            self.sum()
        self._layers.append((x, axes.T.to(x.dtype)))
        self.energy = self.energy + energy.to(self.energy.device)
        if len(self._layers) == _TOGETHER:
            self.sum()

    def sum(self) -> Tensor:
        """Latents of all layers so far: float32 `[T, R]`."""
        layers, self._layers = self._layers, []
        if layers:
            parts = zip(*layers, strict=True)
            x, axes = (torch.cat(part, dim) for part, dim in zip(parts, (1, 0), strict=True))
            if x.dtype == self._latents.dtype and x.device == self._latents.device:
                self._latents.addmm_(x, axes)
            else:
                self._latents.add_((x @ axes).to(self._latents))
        return self._latents

    def compare(self, latents: Tensor, typical: float) -> None:
        """Say so where images lose far more of their variance than those of calibration did.

        Args:
            latents: `[T, R]`, the sums, or least squares of them.
            typical: share that those of calibration lose.
        """
        lost = float(1 - (self.sum() * latents).sum() / self.energy.clamp_min(1e-30))
        if lost > max(_UNLIKE * typical, _LEAST):
            warnings.warn(
                f"these images are unlike those the capsule was fitted to: latents lose {lost:.0%} of "
                f"their variance, {typical:.1%} in calibration; fit with such samples, or retain more",
                UnlikeCalibrationWarning,
                stacklevel=2,
            )
