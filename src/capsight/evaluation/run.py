"""Runs methods over items, each paired with the full cache on the same prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from capsight.blindsight import HeadMap
from capsight.evaluation.asking import Answers
from capsight.evaluation.items import Item
from capsight.evaluation.journal import Journal
from capsight.evaluation.record import ItemRecord
from capsight.evaluation.score import Outcome
from capsight.evaluation.sharing import Asking
from capsight.kvcapsule import CacheMethod


@dataclass
class MethodResult:
    """What one method did: its outcomes, in the order of the items, and its bytes summed over the items."""

    outcomes: list[Outcome] = field(default_factory=list)
    nbytes: int = 0
    nbytes_full: int = 0
    module_nbytes: int = 0

    def add(self, record: ItemRecord, name: str) -> None:
        """Add what the method called `name` did on one item."""
        ours = record.methods[name]
        for task, right, agrees, kl in zip(record.tasks, ours.right, ours.agrees, ours.kl, strict=True):
            self.outcomes.append(Outcome(record.item, task, record.images, right, agrees, kl))
        self.nbytes += ours.nbytes
        self.nbytes_full += ours.nbytes_full


def evaluate(
    model: Any,
    processor: Any,
    items: Iterable[Item],
    methods: Mapping[str, CacheMethod],
    protocol: str = "after",
    head_map: HeadMap | None = None,
    max_new_tokens: int = 24,
    journal: Journal | None = None,
    on_item: Callable[[Item, Mapping[str, Answers]], None] | None = None,
) -> dict[str, MethodResult]:
    """Ask every question with the full cache and with every method.

    Args:
        model: the model.
        processor: its processor.
        items: what to ask; names are unique.
        methods: name -> capsule or baseline; "full" is added by itself.
        protocol: "after" (the judge) or "within".
        head_map: prefill of all methods follows it, and of a row "full + head map"; "full" stays dense.
        max_new_tokens: most tokens of an answer.
        journal: takes every item as it is done; items that it holds are not asked again.
        on_item: called after each item, for progress bars and transcripts; without answers where the
            item was in the journal.

    Returns:
        Results by method name, "full" first.

    Raises:
        OptionError: the protocol is unknown, or a method has a name that is taken.
        CapsightError: a method or the head map does not fit the model.
    """
    asking = Asking(model, processor, methods, protocol, head_map, max_new_tokens)
    results = {
        name: MethodResult(module_nbytes=methods[name].module_nbytes if name in methods else 0)
        for name in asking.names
    }
    for item in items:
        answers: dict[str, Answers] = {}
        record = None if journal is None else journal.done.get(item.name)
        if record is None:
            with torch.no_grad():
                answers = dict(asking.ask(item))
            record = ItemRecord.of(item, answers)
            if journal is not None:
                journal.add(record)
        for name, result in results.items():
            result.add(record, name)
        if on_item is not None:
            on_item(item, answers)
    return results
