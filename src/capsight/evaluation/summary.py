"""From outcomes to the figures of tables: shares, intervals and paired tests, JSON-ready."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from capsight.evaluation.run import MethodResult
from capsight.evaluation.score import Outcome, accuracy, difference_interval, mcnemar_p, scored_pairs
from capsight.evaluation.sharing import FULL


def summary(results: Mapping[str, MethodResult]) -> dict[str, Any]:
    """Everything the tables show of each method: over all questions, per task and per image count.

    `questions` are those with a right answer, `unscored` the others. Without any of the former
    `exact_match` is None; groups without any are left out.
    """
    full = results[FULL]
    report: dict[str, Any] = {}
    for name, result in results.items():
        groups: dict[str, Any] = {}
        for label in ("images", "task"):
            for value in sorted({getattr(o, label) for o in result.outcomes}, key=_order):
                group = [o for o in result.outcomes if getattr(o, label) == value]
                if accuracy(group).total:
                    groups.setdefault(label, {})[str(value)] = _share(group)
        total = max(1, len(result.outcomes))
        report[name] = _share(result.outcomes) | {
            "unscored": sum(o.right is None for o in result.outcomes),
            "drop": round(accuracy(full.outcomes).percent - accuracy(result.outcomes).percent, 2),
            "drop_interval": _interval(full.outcomes, result.outcomes),
            "p_value": _p_value(full.outcomes, result.outcomes),
            "agreement": round(100 * sum(o.agrees for o in result.outcomes) / total, 2),
            "kl": round(sum(o.kl for o in result.outcomes) / total, 5),
            "kv_bytes": result.nbytes,
            "kv_bytes_full": result.nbytes_full,
            "state_bytes": result.state_nbytes,
            "module_bytes": result.module_nbytes,
            "by": groups,
        }
    return report


def paired(results: Mapping[str, MethodResult], first: str) -> list[dict[str, Any]]:
    """One method against every other at the same budget, on the same questions.

    Args:
        results: of `evaluate`.
        first: the method, without its budget.

    Returns:
        A row for each pair: `difference` in points (positive where `method` is better) with its
        `interval`, on how many questions `only` each of them was (more) right, and `p_value`.
    """
    rows = []
    for name, ours in results.items():
        method, retained = split_label(name)
        for other, theirs in results.items() if method == first and retained is not None else ():
            if split_label(other) == (method, retained) or split_label(other)[1] != retained:
                continue
            pairs = [(a, b) for _, a, b in scored_pairs(ours.outcomes, theirs.outcomes)]
            share, base = accuracy(ours.outcomes), accuracy(theirs.outcomes)
            rows.append(
                {
                    "method": name,
                    "against": other,
                    "difference": round(share.percent - base.percent, 2),
                    "interval": _interval(ours.outcomes, theirs.outcomes),
                    "only": [sum(a > b for a, b in pairs), sum(b > a for a, b in pairs)],
                    "p_value": _p_value(ours.outcomes, theirs.outcomes),
                }
            )
    return rows


def split_label(label: str) -> tuple[str, float | None]:
    """The method and the retained fraction in a label such as "heads 0.4"."""
    method, _, last = label.rpartition(" ")
    try:
        return (method, float(last)) if method else (label, None)
    except ValueError:
        return label, None


def _share(outcomes: list[Outcome]) -> dict[str, Any]:
    share = accuracy(outcomes)
    return {
        "exact_match": round(share.percent, 2) if share.total else None,
        "interval": [round(share.low, 2), round(share.high, 2)],
        "questions": share.total,
    }


def _p_value(ours: list[Outcome], theirs: list[Outcome]) -> float:
    pairs = scored_pairs(ours, theirs)
    return round(mcnemar_p([a for _, a, _ in pairs], [b for _, _, b in pairs]), 6)


def _interval(ours: list[Outcome], theirs: list[Outcome]) -> list[float]:
    return [round(100 * end, 2) for end in difference_interval(ours, theirs)]


def _order(value: int | str) -> tuple[int, str]:
    return (value, "") if isinstance(value, int) else (0, value)
