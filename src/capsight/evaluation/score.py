"""Exact match, its confidence interval, and paired comparisons of two methods."""

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
        right: whether the answer matched exactly.
        agrees: whether it equals the full cache's answer.
        kl: KL divergence of the first answer token from the full cache's distribution, in nats.
    """

    item: str
    task: str
    images: int
    right: bool
    agrees: bool
    kl: float


def exact_match(answer: str, reference: str) -> bool:
    """Equal after trimming and folding spaces and case."""
    return " ".join(answer.lower().split()) == " ".join(reference.lower().split())


def wilson_interval(right: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's 95 % interval of a share, as fractions."""
    if total == 0:
        return 0.0, 1.0
    p, denominator = right / total, 1 + z * z / total
    centre = (p + z * z / (2 * total)) / denominator
    half = z / denominator * math.sqrt(p * (1 - p) / total + z * z / (4 * total * total))
    return max(0.0, centre - half), min(1.0, centre + half)


def mcnemar_p(ours: Sequence[bool], theirs: Sequence[bool]) -> float:
    """Exact two-sided McNemar test on paired right/wrong outcomes: probability under no difference."""
    b = sum(a and not t for a, t in zip(ours, theirs, strict=True))
    c = sum(t and not a for a, t in zip(ours, theirs, strict=True))
    n, k = b + c, min(b, c)
    if n == 0:
        return 1.0
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n)


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
    gains: dict[str, list[int]] = {}
    for a, b in zip(ours, theirs, strict=True):
        gains.setdefault(a.item, []).append(int(a.right) - int(b.right))
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
    """Exact match over outcomes, in percent."""
    rows = list(outcomes)
    right = sum(o.right for o in rows)
    low, high = wilson_interval(right, len(rows))
    return Share(100 * right / len(rows) if rows else 0.0, 100 * low, 100 * high, len(rows))
