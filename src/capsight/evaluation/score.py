"""Shares of right answers, their confidence intervals, and paired comparisons of two methods."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Outcome:
    """One question, as answered by one method.

    Attributes:
        item: name of the item.
        task: its task.
        images: image count of the prompt.
        right: how right the answer is, 0-1 (`capsight.evaluation.metric`); None where no right one is known.
        agrees: whether it equals the full cache's answer.
        kl: KL divergence of the first answer token from the full cache's distribution, in nats.
    """

    item: str
    task: str
    images: int
    right: float | None
    agrees: bool
    kl: float


def wilson_interval(right: float, total: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's 95 % interval of a share, as fractions; of scores between 0 and 1 it is a little too wide."""
    if total == 0:
        return 0.0, 1.0
    p, denominator = right / total, 1 + z * z / total
    centre = (p + z * z / (2 * total)) / denominator
    half = z / denominator * math.sqrt(p * (1 - p) / total + z * z / (4 * total * total))
    return max(0.0, centre - half), min(1.0, centre + half)


def mcnemar_p(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Exact two-sided McNemar test on paired scores: probability under no difference.

    Of scores between 0 and 1 it is the sign test: which of the two is the higher one counts.
    """
    b = sum(a > t for a, t in zip(ours, theirs, strict=True))
    c = sum(t > a for a, t in zip(ours, theirs, strict=True))
    n, k = b + c, min(b, c)
    if n == 0:
        return 1.0
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n)


def scored_pairs(ours: Iterable[Outcome], theirs: Iterable[Outcome]) -> list[tuple[str, float, float]]:
    """Item and both scores, of the questions that have one; both sides in the same order."""
    return [
        (a.item, a.right, b.right)
        for a, b in zip(ours, theirs, strict=True)
        if a.right is not None and b.right is not None
    ]


def difference_interval(
    ours: Sequence[Outcome], theirs: Sequence[Outcome], draws: int = 2000
) -> tuple[float, float]:
    """95 % interval of how much more often `ours` is right than `theirs`, as fractions.

    A paired bootstrap over items, since questions of one prompt succeed and fail together; the same for
    the same outcomes.

    Args:
        ours: outcomes of one method.
        theirs: of another, on the same questions in the same order.
        draws: resamples.
    """
    gains: dict[str, list[float]] = {}
    for item, a, b in scored_pairs(ours, theirs):
        gains.setdefault(item, []).append(a - b)
    if not gains:
        return 0.0, 0.0
    sums = np.array([(sum(rows), len(rows)) for rows in gains.values()])  # [items, 2]
    picks = np.random.default_rng(0).integers(len(sums), size=(draws, len(sums)))
    drawn = sums[picks].sum(1)  # [draws, 2]
    low, high = np.quantile(drawn[:, 0] / drawn[:, 1], (0.025, 0.975))
    return float(low), float(high)


@dataclass(frozen=True, slots=True)
class Share:
    """A share of right answers with its interval, in percent."""

    percent: float
    low: float
    high: float
    total: int


def accuracy(outcomes: Iterable[Outcome]) -> Share:
    """Mean score of the outcomes that have one, in percent; 0 of 0 where none has."""
    scores = [o.right for o in outcomes if o.right is not None]
    low, high = wilson_interval(sum(scores), len(scores))
    return Share(100 * sum(scores) / max(1, len(scores)), 100 * low, 100 * high, len(scores))
