"""What heads lose by each category, mean over prompts."""

from __future__ import annotations

import torch
from torch import Tensor

from capsight.blindsight.categories import SPARSE, Category
from capsight.errors import CalibrationError


class Losses:
    """A running mean over prompts of what a criterion gives; nothing is kept of a prompt."""

    def __init__(self, layers: int, heads: int) -> None:
        """Start with no prompts."""
        self.prompts = 0
        self._total = torch.zeros(layers, len(SPARSE), heads, dtype=torch.float64)

    def add(self, lost: Tensor) -> None:
        """Count one prompt.

        Args:
            lost: `[L, 3, Hq]`, what each head loses by each category of `SPARSE`.

        Raises:
            CalibrationError: a number is NaN or infinite, or the shape is another model's.
        """
        if lost.shape != self._total.shape:
            raise CalibrationError(
                f"losses of shape {tuple(lost.shape)}, expected {tuple(self._total.shape)}"
            )
        check_finite(lost)
        self._total += lost
        self.prompts += 1

    def mean(self) -> Tensor:
        """Mean over prompts: float64 `[L, 3, Hq]`."""
        return self._total / max(self.prompts, 1)

    def of(self, layer: int, head: int, category: Category) -> float:
        """What one head loses by a category; 0 for Dense."""
        if category is Category.DENSE:
            return 0.0
        return float(self._total[layer, SPARSE.index(category), head]) / self.prompts


def check_finite(lost: Tensor) -> None:
    """Refuse losses that are no numbers.

    Raises:
        CalibrationError: one is NaN or infinite.
    """
    if not torch.isfinite(lost).all():
        raise CalibrationError(
            "attention of a calibration prompt holds NaN or infinite values; run the model in float32 or "
            "bfloat16 and check that the samples are what its processor makes"
        )
