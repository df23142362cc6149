"""Who answered which question right: everything that the judges' page, tests and choices are made of.

A JSON file for each judge holds its splits and, method by method, a "1" or "0" for every question of every
prompt. Methods can be asked in several runs, and of fewer prompts; two are compared on the prompts that both
were asked."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from capsight.evaluation import FULL, Item, MethodResult
from capsight.evaluation.score import Outcome, difference_interval, mcnemar_p
from capsight.files import replace_file

FEW = 5
"""Questions of a kind below which nothing is said about it."""
Key = tuple[str, int]
"""A prompt and the number of a question."""


@dataclass(frozen=True)
class Pair:
    """Two methods on the questions that both were asked.

    Attributes:
        points: how many points of exact match the first is behind the second.
        p: exact two-sided McNemar test.
        questions: how many.
    """

    points: float
    p: float
    questions: int


class Judged:
    """One judge on one split."""

    def __init__(self, values: dict[str, Any]) -> None:
        """Wrap the part of the file that is about it."""
        self.values = values
        self._right: dict[str, dict[Key, bool]] = {}

    @property
    def methods(self) -> list[str]:
        """Labels: the full cache, `joint`, then the others as they were asked."""
        return sorted(
            self.values.get("methods", {}), key=lambda label: (label != FULL, not label.startswith("joint "))
        )

    @property
    def tasks(self) -> dict[Key, str]:
        """The kind of every question."""
        return {
            (name, i): kind
            for name, kinds in self.values["prompts"].items()
            for i, kind in enumerate(kinds.split(","))
        }

    def right(self, label: str) -> dict[Key, bool]:
        """Whether each question was answered right."""
        if label not in self._right:
            rows = self.values["methods"][label]["right"].split(" ")
            self._right[label] = {
                (name, i): mark == "1"
                for name, row in zip(self.values["prompts"], rows, strict=False)
                if row != "-"
                for i, mark in enumerate(row)
            }
        return self._right[label]

    def percent(self, label: str, kinds: Iterable[str] | None = None) -> float:
        """Exact match; of some kinds of question, if they are named."""
        tasks, wanted = self.tasks, None if kinds is None else set(kinds)
        marks = [own for key, own in self.right(label).items() if wanted is None or tasks[key] in wanted]
        return 100 * sum(marks) / max(len(marks), 1)

    def pair(self, label: str, other: str, kinds: Iterable[str] | None = None) -> Pair:
        """How far `label` is behind `other`."""
        ours, theirs, tasks = self.right(label), self.right(other), self.tasks
        wanted = None if kinds is None else set(kinds)
        keys = [k for k in ours if k in theirs and (wanted is None or tasks[k] in wanted)]
        a, b = [ours[k] for k in keys], [theirs[k] for k in keys]
        return Pair(100 * (sum(b) - sum(a)) / max(len(keys), 1), mcnemar_p(a, b), len(keys))

    def lost(self, label: str) -> Pair:
        """How far a method is behind the full cache."""
        return self.pair(label, FULL)

    def lost_interval(self, label: str) -> tuple[float, float]:
        """95 % interval of the points that a method is behind the full cache, by bootstrap over prompts."""
        full, own = self.right(FULL), self.right(label)
        both = [k for k in own if k in full]
        theirs, ours = (
            [Outcome(k[0], "", 0, float(marks[k]), True, 0.0) for k in both] for marks in (full, own)
        )
        low, high = difference_interval(theirs, ours)
        return 100 * low, 100 * high

    def kinds(self, label: str) -> dict[str, Pair]:
        """The same by kind of question."""
        kinds = sorted(set(self.tasks.values()))
        found = {kind: self.pair(label, FULL, [kind]) for kind in kinds}
        return {kind: pair for kind, pair in found.items() if pair.questions}

    def worst(self, label: str) -> tuple[str, float]:
        """The kind of question that loses most, and how many points; of kinds that were asked `FEW` times."""
        found = self.kinds(label)
        asked = {kind: pair for kind, pair in found.items() if pair.questions >= FEW} or found
        kinds = {kind: pair.points for kind, pair in asked.items()}
        worst = max(kinds, key=lambda kind: kinds[kind])
        return worst, kinds[worst]

    def rows(self) -> dict[str, dict[str, Any]]:
        """What `readme_picture` draws."""
        return {
            label: {
                "exact_match": self.percent(label),
                "kv_bytes": self.values["methods"][label]["bytes"],
                "kv_bytes_full": self.values["methods"][label]["full_bytes"],
            }
            for label in self.methods
        }

    def share(self, label: str, modules: bool = False) -> float:
        """KV bytes of all tokens over those of the full cache, `modules` counted once for each prompt."""
        own = self.values["methods"][label]
        extra = own["module_bytes"] * len(own["right"].split()) if modules else 0
        return float((own["bytes"] + extra) / own["full_bytes"])


class Record:
    """The folder of those files."""

    def __init__(self, folder: Path) -> None:
        """Use a folder, which need not exist."""
        self._folder = folder

    def load(self, judge: str) -> dict[str, Any]:
        """What stands in a judge's file: a part for each split, and the machine."""
        path = self._folder / f"{judge}.json"
        values: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        return values

    def judges(self, split: str) -> dict[str, Judged]:
        """Those that were asked a split."""
        found = {path.stem: self.load(path.stem) for path in sorted(self._folder.glob("*.json"))}
        return {name: Judged(values[split]) for name, values in found.items() if split in values}

    def asked(self, judge: str, split: str, label: str, items: list[Item]) -> bool:
        """Whether a method was asked all the items already."""
        part = self.load(judge).get(split)
        if part is None or label not in part["methods"]:
            return False
        names = dict(zip(part["prompts"], part["methods"][label]["right"].split(" "), strict=False))
        return all(names.get(item.name, "-") != "-" for item in items)

    def add(
        self, judge: str, split: str, items: list[Item], results: dict[str, MethodResult], machine: Any
    ) -> None:
        """Add what methods, the full cache among them, said of items; what was asked of more stays."""
        values = self.load(judge)
        part = values.setdefault(split, {"prompts": {}, "methods": {}})
        for item in items:
            part["prompts"].setdefault(item.name, ",".join(ask.task for ask in item.asks))
        for label, result in results.items():
            marks: dict[str, str] = {}
            for outcome in result.outcomes:
                marks[outcome.item] = marks.get(outcome.item, "") + str(int(bool(outcome.right)))
            known = part["methods"].get(label)
            if known is not None and sum(row != "-" for row in known["right"].split(" ")) > len(marks):
                continue
            part["methods"][label] = {
                "bytes": result.nbytes,
                "full_bytes": result.nbytes_full,
                "module_bytes": result.module_nbytes,
                "right": " ".join(marks.get(name, "-") for name in part["prompts"]),
            }
        values["machine"] = machine
        self._folder.mkdir(parents=True, exist_ok=True)
        replace_file(self._folder / f"{judge}.json", json.dumps(values, indent=1) + "\n")
