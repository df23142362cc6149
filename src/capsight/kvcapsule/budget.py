"""How many tokens of a block each layer keeps, for a given average over the layers (our design).

Water-filling: one more token at a time goes to the layer where it removes the most error. The error of
a layer is the relative error of its rebuilt tokens, times the attention that the layer pays to vision
tokens; both are measured at calibration. Plain numbers in, plain numbers out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from numbers import Real
from typing import Any, Literal

from capsight.errors import CapsuleFileError, OptionError

Budget = Literal["water-filled", "uniform"]
BUDGETS: tuple[Budget, ...] = ("water-filled", "uniform")
"""How an average is shared out: by need, or the same for every layer."""

DEFAULT_BUDGET: Budget = "uniform"
"""Of codecs that can have either; benchmarks/layer_budget.py compares the two."""

LEAST = 0.25
"""Of the average, what every layer keeps at least: errors are measured without the layers after it."""

FRACTIONS = (1 / 16, 1 / 8, 3 / 16, 1 / 4, 3 / 8, 1 / 2, 3 / 4)
"""Retained fractions at which errors are measured."""


def default_retained(method: str) -> float:
    """The retained fraction of a codec or baseline where none is named; 0.40 is the paper's."""
    return 0.05 if method == "joint" else 0.40


def check_share(retained: Any) -> None:
    """Refuse a share of bytes or tokens that is none.

    Raises:
        OptionError: `retained` is no number in (0, 1].
    """
    if isinstance(retained, bool) or not isinstance(retained, Real) or not 0 < float(retained) <= 1:
        raise OptionError(f"retained is a fraction in (0, 1], not {retained!r}")


def share_to_keep(
    retained: float | None, compression_ratio: float | None, default: float | None = None
) -> float:
    """The retained fraction, given as such or as `compression_ratio` = 1 - retained, the field's word.

    Raises:
        OptionError: both are given, or neither and there is no default, or one is out of range.
    """
    if retained is not None and compression_ratio is not None:
        raise OptionError("give retained or compression_ratio (which is 1 - retained), not both")
    if compression_ratio is not None:
        if not isinstance(compression_ratio, Real) or not 0 <= compression_ratio < 1:
            raise OptionError(f"compression_ratio is a fraction in [0, 1), not {compression_ratio!r}")
        return round(1 - compression_ratio, 12)
    share = default if retained is None else retained
    if share is None:
        raise OptionError("give retained or compression_ratio (which is 1 - retained)")
    check_share(share)
    return share


@dataclass(frozen=True, slots=True)
class LayerNeeds:
    """What the L layers of a capsule need, as measured at calibration.

    Attributes:
        kept: the P numbers of kept tokens at which errors were measured, ascending.
        errors: relative squared error of rebuilt keys and values, `[L][P]`: 0 is perfect, 1 is as bad as
            the mean.
        attention: share of its attention that a layer pays to vision tokens, `[L]`.
    """

    kept: tuple[int, ...]
    errors: tuple[tuple[float, ...], ...]
    attention: tuple[float, ...]

    def share_out(self, kept: int, block_size: int) -> tuple[int, ...]:
        """Tokens that each layer keeps of a block of `block_size`, `kept` on average (`water_fill`)."""
        curves = [error_curve(self.kept, errors, block_size) for errors in self.errors]
        return water_fill(curves, self.attention, kept)

    def errors_at(self, kept: Sequence[int], block_size: int) -> list[float]:
        """Relative squared error of each layer with `kept` tokens of a block, read off its curve."""
        return [
            error_curve(self.kept, errors, block_size)[count]
            for errors, count in zip(self.errors, kept, strict=True)
        ]

    @classmethod
    def from_header(cls, values: Any, layers: int, block_size: int) -> LayerNeeds:
        """The needs of a number of layers, as `dataclasses.asdict` and JSON give them.

        Raises:
            CapsuleFileError: they are malformed.
        """
        try:
            needs = cls(
                tuple(int(count) for count in values["kept"]),
                tuple(tuple(float(error) for error in row) for row in values["errors"]),
                tuple(float(share) for share in values["attention"]),
            )
        except (TypeError, ValueError, KeyError, OverflowError) as error:
            raise CapsuleFileError(f"field needs of the capsule file is malformed: {error!r}") from error
        numbers = [x for row in (*needs.errors, needs.attention) for x in row]
        ascending = all(a < b for a, b in pairwise((0, *needs.kept, block_size)))
        sizes = [len(row) for row in needs.errors] == [len(needs.kept)] * layers
        finite = all(math.isfinite(x) and x >= 0 for x in numbers)
        if not ascending or not sizes or len(needs.attention) != layers or not finite:
            raise CapsuleFileError(
                f"field needs of the capsule file does not hold the errors and attention of {layers} layers"
            )
        return needs


def measured_counts(block_size: int) -> tuple[int, ...]:
    """Numbers of kept tokens, of a block of `block_size`, at which errors are to be measured."""
    return tuple(sorted({round(f * block_size) for f in FRACTIONS} - {0, block_size}))


def error_curve(kept: Sequence[int], errors: Sequence[float], block_size: int) -> list[float]:
    """Error of a layer with 0, 1, ..., N tokens kept.

    The largest convex curve through (0, 1) and (N, 0) that is nowhere above the points, so it never
    rises, and every further token removes no more error than the one before.

    Args:
        kept: numbers of tokens, ascending, between 0 and N.
        errors: the error measured with each of them, at least 0.
        block_size: tokens of a block (N).

    Returns:
        `[N + 1]`, from 1 or less down to 0.
    """
    hull: list[tuple[int, float]] = []
    for point in [(0, 1.0), *zip(kept, errors, strict=True), (block_size, 0.0)]:
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-1], point):
            hull.pop()
        hull.append(point)
    curve = [1.0]
    for left, right in pairwise(hull):
        slope = _slope(left, right)
        curve += [left[1] + slope * step for step in range(1, right[0] - left[0])] + [right[1]]
    return curve


def water_fill(curves: Sequence[Sequence[float]], weights: Sequence[float], kept: int) -> tuple[int, ...]:
    """Tokens that each layer keeps, so that the weighted sum of errors is least.

    Args:
        curves: error of each of L layers with 0, 1, ..., N tokens kept: `[L][N + 1]`, convex.
        weights: of the layers, at least 0.
        kept: tokens kept on average, 1..N.

    Returns:
        `[L]` numbers between `LEAST` of the average (at least 1) and N, whose sum is L * `kept`. With a
        larger average no layer keeps less. Layers alike, or all without weight, keep the same.
    """
    least = max(int(LEAST * kept), 1)
    gains = sorted(
        (-weight * (curve[count] - curve[count + 1]), count, layer)
        for layer, (curve, weight) in enumerate(zip(curves, weights, strict=True))
        for count in range(least, len(curve) - 1)
    )
    counts = [least] * len(curves)
    for _, _, layer in gains[: (kept - least) * len(curves)]:
        counts[layer] += 1
    return tuple(counts)


def share_out(
    budget: Budget, needs: LayerNeeds | None, layers: int, kept: int, block_size: int
) -> tuple[int, ...]:
    """Tokens that each of a number of layers keeps of a block of `block_size`, `kept` on average.

    Raises:
        OptionError: the budget is water-filled, and there are no needs to go by.
    """
    if budget == "uniform":
        return (kept,) * layers
    if needs is None:
        raise OptionError(
            "this capsule holds no errors of its layers to share tokens out by; fit it again (heads, "
            "adaptive or evict), or use budget='uniform'"
        )
    return needs.share_out(kept, block_size)


def check_budget(budget: str) -> Budget:
    """The budget of that name.

    Raises:
        OptionError: there is none.
    """
    for known in BUDGETS:
        if budget == known:
            return known
    raise OptionError(f"budget must be one of {list(BUDGETS)}, not {budget!r}")


def _slope(a: tuple[int, float], b: tuple[int, float]) -> float:
    return (b[1] - a[1]) / (b[0] - a[0])
