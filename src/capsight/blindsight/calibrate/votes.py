"""From losses per prompt to one category per head."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from capsight.blindsight.categories import SPARSE, Category
from capsight.errors import OptionError


@dataclass(frozen=True, slots=True)
class Thresholds:
    """When a category is good enough for a prompt, and a head for a category.

    That there are an alpha per layer and three gammas is reported of BlindSight by secondary sources;
    what they mean here, and their values, are this project's.

    Attributes:
        alpha: (in the first layer, in the last), linear in between: a category is good enough for a
            head and prompt if it loses at most this, in the criterion's unit.
        gamma_d: a head is Dense if Intra-Image+Sink is not good enough for more than this share of prompts.
        gamma_s: otherwise it is Sink if that is good enough for at least this share...
        gamma_i: ...or else Intra-Image if that is, and in the end Intra-Image+Sink.

    Raises:
        OptionError: a value is out of range.
    """

    alpha: tuple[float, float]
    gamma_d: float
    gamma_s: float
    gamma_i: float

    def __post_init__(self) -> None:
        """Check the ranges."""
        if min(self.alpha) < 0:
            raise OptionError(f"alpha must be 0 or more, not {self.alpha}")
        for name in ("gamma_d", "gamma_s", "gamma_i"):
            if not 0 <= getattr(self, name) <= 1:
                raise OptionError(f"{name} is a share of prompts, from 0 to 1, not {getattr(self, name)}")

    def alphas(self, layers: int) -> Tensor:
        """Alpha per layer: float32 `[L]`."""
        return torch.linspace(*self.alpha, layers)

    def to_dict(self) -> dict[str, float]:
        """As `CalibrationRecord.thresholds` has them."""
        gammas = {"gamma_d": self.gamma_d, "gamma_s": self.gamma_s, "gamma_i": self.gamma_i}
        return {"alpha_first": self.alpha[0], "alpha_last": self.alpha[1], **gammas}


class Votes:
    """Running counts over prompts; nothing is kept of a prompt but one bit per head and category."""

    def __init__(self, layers: int, heads: int, thresholds: Thresholds) -> None:
        """Start with no prompts."""
        self.thresholds = thresholds
        self.prompts = 0
        self._good = torch.zeros(layers, len(SPARSE), heads)

    def add(self, lost: Tensor) -> None:
        """Count one prompt.

        Args:
            lost: `[L, 3, Hq]`, finite, what each head loses by each category of `SPARSE`.
        """
        self._good += lost <= self.thresholds.alphas(lost.shape[0])[:, None, None]
        self.prompts += 1

    def shares(self) -> Tensor:
        """Share of prompts for which a category was good enough: float32 `[L, 3, Hq]`."""
        return self._good / self.prompts

    def decide(self) -> tuple[tuple[Category, ...], ...]:
        """The category of every head: [layers][heads]."""
        return tuple(tuple(map(self._category, layer.T.tolist())) for layer in self.shares())

    def to_dict(self) -> dict[Category, list[list[float]]]:
        """As `CalibrationRecord.votes` has them: category -> [layers][heads]."""
        shares = self.shares()
        return {
            category: [[round(share, 4) for share in layer] for layer in shares[:, index].tolist()]
            for index, category in enumerate(SPARSE)
        }

    def _category(self, shares: list[float]) -> Category:
        good = dict(zip(SPARSE, shares, strict=True))
        if 1 - good[Category.INTRA_IMAGE_SINK] > self.thresholds.gamma_d + 1e-6:
            return Category.DENSE
        if good[Category.SINK] >= self.thresholds.gamma_s - 1e-6:
            return Category.SINK
        if good[Category.INTRA_IMAGE] >= self.thresholds.gamma_i - 1e-6:
            return Category.INTRA_IMAGE
        return Category.INTRA_IMAGE_SINK
