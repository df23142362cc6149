"""Runs methods over items, each paired with the full cache on the same prompts."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import tee
from typing import Any

import torch

from capsight.blindsight import HeadMap
from capsight.errors import OptionError
from capsight.evaluation.asking import Answers
from capsight.evaluation.items import Item
from capsight.evaluation.journal import Journal
from capsight.evaluation.metric import check_metric
from capsight.evaluation.parallel import check_workers, in_order
from capsight.evaluation.record import ItemRecord
from capsight.evaluation.score import Outcome
from capsight.evaluation.sharing import Asking
from capsight.kvcapsule import CacheMethod


@dataclass
class MethodResult:
    """What one method did: its outcomes, in the order of the items, and its bytes summed over the items.

    Bytes of states are counted apart from those of keys and values.
    """

    outcomes: list[Outcome] = field(default_factory=list)
    nbytes: int = 0
    nbytes_full: int = 0
    module_nbytes: int = 0
    state_nbytes: int = 0

    def add(self, record: ItemRecord, name: str) -> None:
        """Add what the method called `name` did on one item."""
        ours = record.methods[name]
        for task, right, agrees, kl in zip(record.tasks, ours.right, ours.agrees, ours.kl, strict=True):
            self.outcomes.append(Outcome(record.item, task, record.images, right, agrees, kl))
        self.nbytes += ours.nbytes
        self.nbytes_full += ours.nbytes_full
        self.state_nbytes += ours.state_nbytes


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
    workers: int = 1,
    metric: str = "exact",
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
            item was in the journal, or another process had it.
        workers: processes, of one thread each if there are several (CPU, Linux).
        metric: how answers are scored: "exact", "normalised", "anls" or "relaxed".

    Returns:
        Results by method name, "full" first.

    Raises:
        OptionError: the protocol or the metric is unknown, a method has a name that is taken, or `workers`
            cannot be; the journal holds an item with other questions or methods.
        CapsightError: a method or the head map does not fit the model.
    """
    asking = Asking(model, processor, methods, protocol, head_map, max_new_tokens)
    check_workers(workers, model.device.type)
    check_metric(metric)
    results = {
        name: MethodResult(module_nbytes=methods[name].module_nbytes if name in methods else 0)
        for name in asking.names
    }
    done = {} if journal is None else journal.done
    answers: dict[str, Answers] = {}

    def ask(item: Item) -> ItemRecord:
        with torch.no_grad():
            answers.update(asking.ask(item))
        return ItemRecord.of(item, answers, metric)

    for item, record in _records(ask, items, done, workers):
        if journal is not None and item.name not in done:
            journal.add(record)
        _check(record, item, results)
        for name, result in results.items():
            result.add(record, name)
        if on_item is not None:
            on_item(item, dict(answers))
        answers.clear()
    return results


def _check(record: ItemRecord, item: Item, names: Collection[str]) -> None:
    """Refuse what a journal holds of other questions, or without a method.

    Raises:
        OptionError: it does.
    """
    asked = len(item.images), [ask.task for ask in item.asks]
    if (record.images, record.tasks) != asked or not set(names) <= record.methods.keys():
        raise OptionError(
            f"the journal holds {item.name} with other pictures, questions or methods than these; give it "
            "settings with all that results depend on, and begin another"
        )


def _records(
    ask: Callable[[Item], ItemRecord], items: Iterable[Item], done: Mapping[str, ItemRecord], workers: int
) -> Iterator[tuple[Item, ItemRecord]]:
    """Every item and its record, from the journal where it is there."""
    if workers == 1:
        for item in items:
            yield item, done[item.name] if item.name in done else ask(item)
        return
    taken, asked = tee(items)
    new_records = in_order(ask, (item for item in asked if item.name not in done), workers)
    for item in taken:
        yield item, done[item.name] if item.name in done else next(new_records)
