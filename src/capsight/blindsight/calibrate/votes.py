"""From losses per prompt to one category per head."""

from __future__ import annotations

import math
from collections.abc import Sequence
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

    def share_for(self, category: Category) -> float:
        """The share of prompts that a sparse category has to be good enough for."""
        shares = {Category.SINK: self.gamma_s, Category.INTRA_IMAGE: self.gamma_i}
        return shares.get(category, 1 - self.gamma_d)

    def category(self, shares: Sequence[float]) -> Category:
        """The category of a head, from the share of prompts for which each of `SPARSE` is good enough."""
        good = dict(zip(SPARSE, shares, strict=True))
        enough = {c: good[c] >= self.share_for(c) - 1e-6 for c in SPARSE}
        if not enough[Category.INTRA_IMAGE_SINK]:
            return Category.DENSE
        return next(c for c in SPARSE if enough[c])

    def to_dict(self) -> dict[str, float]:
        """As `CalibrationRecord.thresholds` has them."""
        gammas = {"gamma_d": self.gamma_d, "gamma_s": self.gamma_s, "gamma_i": self.gamma_i}
        return {"alpha_first": self.alpha[0], "alpha_last": self.alpha[1], **gammas}


class Votes:
    """What every prompt says of every head; `3 L Hq` numbers a prompt are kept, so any alpha can be tried."""

    def __init__(self, layers: int, heads: int) -> None:
        """Start with no prompts."""
        self.layers, self.heads = layers, heads
        self._lost: list[Tensor] = []

    @property
    def prompts(self) -> int:
        """How many have voted."""
        return len(self._lost)

    def add(self, lost: Tensor) -> None:
        """Count one prompt.

        Args:
            lost: `[L, 3, Hq]`, finite, what each head loses by each category of `SPARSE`.
        """
        self._lost.append(lost.float())

    def shares(self, thresholds: Thresholds) -> Tensor:
        """Share of prompts for which a category was good enough: float32 `[L, 3, Hq]`."""
        alphas = thresholds.alphas(self.layers)[:, None, None]
        return (torch.stack(self._lost) <= alphas).float().mean(0)

    def change_points(self, thresholds: Thresholds) -> list[float]:
        """The values of alpha, ascending, at which some head gets another category.

        Of the thresholds only the gammas count.
        """
        ascending = torch.stack(self._lost).sort(0).values  # [P, L, 3, Hq]
        points = []
        for index, category in enumerate(SPARSE):
            needed = math.ceil(thresholds.share_for(category) * self.prompts - 1e-6)
            points.append(ascending[max(needed, 1) - 1, :, index])
        return torch.unique(torch.stack(points)).tolist()

    def decide(self, thresholds: Thresholds) -> tuple[tuple[Category, ...], ...]:
        """The category of every head: [layers][heads]."""
        shares = self.shares(thresholds)
        return tuple(tuple(thresholds.category(head) for head in layer.T.tolist()) for layer in shares)

    def to_dict(self, thresholds: Thresholds) -> dict[Category, list[list[float]]]:
        """As `CalibrationRecord.votes` has them: category -> [layers][heads]."""
        shares = self.shares(thresholds)
        return {
            category: [[round(share, 4) for share in layer] for layer in shares[:, index].tolist()]
            for index, category in enumerate(SPARSE)
        }
