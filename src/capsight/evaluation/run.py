"""Runs methods over items, each paired with the full cache on the same prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from capsight.evaluation.asking import Answers, ask_item
from capsight.evaluation.items import Item
from capsight.evaluation.score import Outcome, accuracy, exact_match, mcnemar_p
from capsight.kvcapsule import CacheMethod
from capsight.runtime import enable

FULL = "full"


@dataclass
class MethodResult:
    """What one method did: its outcomes, in the order of the items, and its bytes summed over the items."""

    outcomes: list[Outcome] = field(default_factory=list)
    nbytes: int = 0
    nbytes_full: int = 0
    module_nbytes: int = 0

    def add(self, item: Item, answers: Answers, full: Answers) -> None:
        """Add one item's answers, beside those of the full cache."""
        ours, theirs = answers.first_logits.log_softmax(-1), full.first_logits.log_softmax(-1)
        kl = (theirs.exp() * (theirs - ours)).sum(-1).clamp_min(0)
        for i, ask in enumerate(item.asks):
            right = exact_match(answers.texts[i], ask.answer)
            agrees = exact_match(answers.texts[i], full.texts[i])
            self.outcomes.append(Outcome(item.name, ask.task, len(item.images), right, agrees, kl[i].item()))
        self.nbytes += answers.nbytes
        self.nbytes_full += answers.nbytes_full


def evaluate(
    model: Any,
    processor: Any,
    items: Iterable[Item],
    methods: Mapping[str, CacheMethod],
    protocol: str = "after",
    on_item: Callable[[Item, dict[str, Answers]], None] | None = None,
) -> dict[str, MethodResult]:
    """Ask every question with the full cache and with every method.

    Args:
        model: the model.
        processor: its processor.
        items: what to ask.
        methods: name -> capsule or baseline; "full" is added by itself.
        protocol: "after" (the judge) or "within".
        on_item: called after each item, for progress bars and transcripts.

    Returns:
        Results by method name, "full" first.
    """
    results = {FULL: MethodResult()} | {
        name: MethodResult(module_nbytes=capsule.module_nbytes) for name, capsule in methods.items()
    }
    for item in items:
        with enable(model) as fast, torch.no_grad():
            answers = {FULL: ask_item(fast, processor, item, protocol)}
        for name, capsule in methods.items():
            with enable(model, capsule=capsule) as fast, torch.no_grad():
                answers[name] = ask_item(fast, processor, item, protocol)
        for name, result in results.items():
            result.add(item, answers[name], answers[FULL])
        if on_item is not None:
            on_item(item, answers)
    return results


def summary(results: Mapping[str, MethodResult]) -> dict[str, Any]:
    """Everything the tables show, as JSON-ready values: per method, per task and per image count."""
    full = results[FULL]
    report: dict[str, Any] = {}
    for name, result in results.items():
        pairs = list(zip(result.outcomes, full.outcomes, strict=True))
        groups: dict[str, Any] = {}
        for label, key in (("images", lambda o: o.images), ("task", lambda o: o.task)):
            for value in sorted({key(o) for o in result.outcomes}, key=str):
                share = accuracy(o for o in result.outcomes if key(o) == value)
                groups.setdefault(label, {})[str(value)] = {
                    "exact_match": round(share.percent, 2),
                    "interval": [round(share.low, 2), round(share.high, 2)],
                    "questions": share.total,
                }
        share, base = accuracy(result.outcomes), accuracy(full.outcomes)
        report[name] = {
            "exact_match": round(share.percent, 2),
            "interval": [round(share.low, 2), round(share.high, 2)],
            "questions": share.total,
            "drop": round(base.percent - share.percent, 2),
            "p_value": round(mcnemar_p([o.right for o, _ in pairs], [f.right for _, f in pairs]), 4),
            "agreement": round(100 * sum(o.agrees for o in result.outcomes) / max(1, share.total), 2),
            "kl": round(sum(o.kl for o in result.outcomes) / max(1, share.total), 5),
            "kv_bytes": result.nbytes,
            "kv_bytes_full": result.nbytes_full,
            "module_bytes": result.module_nbytes,
            "by": groups,
        }
    return report
