"""How right an answer is, beside one or several right ones: the measures of the field."""

from __future__ import annotations

import math
import re
import string
from collections.abc import Callable, Sequence

from capsight.errors import OptionError

ANLS_THRESHOLD = 0.5
"""Normalised distance from which ANLS counts an answer as wrong."""

RELAXED_TOLERANCE = 0.05
"""Share of the right number that relaxed accuracy lets an answer be off by."""


def exact_match(answer: str, reference: str) -> bool:
    """Equal after trimming and folding spaces and case."""
    return _folded(answer) == _folded(reference)


def normalised_match(answer: str, reference: str) -> bool:
    """Equal after SQuAD's normalisation: lower case, without punctuation and articles, spaces folded.

    Rajpurkar et al., SQuAD: 100,000+ Questions for Machine Comprehension of Text (2016), section 6.1.
    """
    return _normalised(answer) == _normalised(reference)


def anls(answer: str, reference: str) -> float:
    """Normalised Levenshtein similarity, 0 where less than half is alike; ANLS is its mean over questions.

    The distance is in letters, over the longer text, both trimmed and in lower case. Biten et al., Scene
    Text Visual Question Answering (2019), equation 1; DocVQA uses it.
    """
    predicted, right = _folded(answer), _folded(reference)
    longest = max(len(predicted), len(right))
    apart = levenshtein(predicted, right) / longest if longest else 0.0
    return 1 - apart if apart < ANLS_THRESHOLD else 0.0


def relaxed_match(answer: str, reference: str) -> bool:
    """Numbers within 5 % of the right one, which is not 0; anything else an exact match.

    A percent sign divides by 100. Methani et al., PlotQA: Reasoning over Scientific Plots (2020), section
    5; Masry et al., ChartQA (2022), section 5; percent as in Pix2Struct's evaluation (Lee et al., 2023).
    """
    predicted, right = _number(answer), _number(reference)
    if predicted is None or not right:
        return exact_match(answer, reference)
    return abs(predicted - right) <= RELAXED_TOLERANCE * abs(right)


METRICS: dict[str, Callable[[str, str], float]] = {
    "exact": exact_match,
    "normalised": normalised_match,
    "anls": anls,
    "relaxed": relaxed_match,
}
"""Measures by name: from an answer and a right one to 0-1."""


def check_metric(name: str) -> str:
    """The name, if it is one of `METRICS`.

    Raises:
        OptionError: it is not.
    """
    if name not in METRICS:
        raise OptionError(f"metric is {name!r}; use one of {', '.join(METRICS)}")
    return name


def score(answer: str, references: Sequence[str], metric: str = "exact") -> float | None:
    """How right an answer is: by the reference that it fits best, as the field does.

    Args:
        answer: what was said.
        references: every right answer.
        metric: out of `METRICS`.

    Returns:
        0 to 1; None without references.
    """
    return max((float(METRICS[metric](answer, reference)) for reference in references), default=None)


def levenshtein(a: str, b: str) -> int:
    """Least number of letters to insert, delete or replace between two texts."""
    row = list(range(len(b) + 1))
    for i, letter in enumerate(a, 1):
        above, row[0] = row[0], i
        for j, other in enumerate(b, 1):
            above, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, above + (letter != other))
    return row[-1]


def _folded(text: str) -> str:
    return " ".join(text.lower().split())


def _normalised(text: str) -> str:
    text = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def _number(text: str) -> float | None:
    text = text.strip()
    try:
        value = float(text.rstrip("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
