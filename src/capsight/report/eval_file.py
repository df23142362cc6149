"""What `capsight eval --json` writes, read and checked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from capsight.evaluation import FULL, split_label
from capsight.report.fields import Fields

_WRITER = "capsight eval --json"


@dataclass(frozen=True, slots=True)
class Cell:
    """Exact match of some questions, in percent, with its 95 % interval."""

    percent: float
    low: float
    high: float
    questions: int


@dataclass(frozen=True, slots=True)
class MethodRow:
    """One method at one retained fraction.

    Attributes:
        name: as in the file, such as "heads 0.4".
        method: the name without the retained fraction.
        retained: the fraction; None where the name has none, as "full".
        all: exact match over all questions.
        drop: points below the full cache.
        p_value: of the paired test against the full cache.
        agreement: percent of answers equal to those of the full cache.
        kl: mean KL divergence of the first answer token, in nats.
        kv_bytes: summed over the prompts.
        kv_bytes_full: the same of the full cache.
        module_bytes: of the modules, once.
        by: "images" and "task" -> value -> exact match.
    """

    name: str
    method: str
    retained: float | None
    all: Cell
    drop: float
    p_value: float
    agreement: float
    kl: float
    kv_bytes: int
    kv_bytes_full: int
    module_bytes: int
    by: dict[str, dict[str, Cell]]

    @property
    def share(self) -> float:
        """KV bytes as a fraction of the full cache's."""
        return self.kv_bytes / self.kv_bytes_full


@dataclass(frozen=True, slots=True)
class EvalFile:
    """One evaluation.

    Attributes:
        model: what was evaluated.
        protocol: "after" or "within".
        methods: the full cache first, then as in the file.
        machine: what it ran on.
    """

    model: str
    protocol: str
    methods: tuple[MethodRow, ...]
    machine: dict[str, Any]

    @property
    def full(self) -> MethodRow:
        """The full cache."""
        return self.methods[0]


def read_eval(path: Path) -> EvalFile:
    """Read a file.

    Raises:
        CapsuleFileError: it cannot be read, or is not what `capsight eval --json` writes.
    """
    fields = Fields.read(path, _WRITER)
    rows = [_row(name, row) for name, row in fields.named("methods")]
    full = [row for row in rows if row.name == FULL]
    if not full:
        fields.fail(f"there is no method {FULL!r} to compare with")
    return EvalFile(
        fields.text("model"),
        fields.text("protocol"),
        (*full, *(row for row in rows if row.name != FULL)),
        fields.object("machine").raw(),
    )


def _row(name: str, row: Fields) -> MethodRow:
    by = row.object("by")
    full = row.count("kv_bytes_full")
    if full == 0:
        row.fail(f"method {name!r} saw no prompt (kv_bytes_full is 0)")
    method, retained = split_label(name)
    return MethodRow(
        name,
        method,
        retained,
        _cell(row),
        row.number("drop"),
        row.number("p_value"),
        row.number("agreement"),
        row.number("kl"),
        row.count("kv_bytes"),
        full,
        row.count("module_bytes"),
        {label: {v: _cell(c) for v, c in by.named(label)} for label in by.raw()},
    )


def _cell(fields: Fields) -> Cell:
    if fields.raw().get("questions") == 0:
        fields.fail("no question has a right answer, so there is no accuracy to report")
    return Cell(fields.number("exact_match"), *fields.interval("interval"), fields.count("questions"))
