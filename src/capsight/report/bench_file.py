"""The JSON of `capsight bench --json`: rows of one method, batch and prompt each."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from capsight.evaluation import FULL
from capsight.evaluation.bench_row import BenchRow
from capsight.report.fields import Fields

_WRITER = "capsight bench --json"


@dataclass(frozen=True, slots=True)
class BenchFile:
    """One benchmark run; the file is `{"rows": [...], "machine": {...}}`.

    Attributes:
        rows: in the order of the file.
        machine: what it ran on.
    """

    rows: tuple[BenchRow, ...]
    machine: dict[str, Any]

    def names(self) -> list[str]:
        """The methods, the full cache first."""
        found = dict.fromkeys(row.name for row in self.rows)
        return sorted(found, key=lambda name: name != FULL)


def read_bench(path: Path) -> BenchFile:
    """Read a file.

    Raises:
        CapsuleFileError: it cannot be read, or its rows are not those of `BenchRow`.
    """
    fields = Fields.read(path, _WRITER)
    rows = tuple(_row(row) for row in fields.rows("rows"))
    if not rows:
        fields.fail("there are no rows")
    return BenchFile(rows, fields.object("machine").raw())


def _row(row: Fields) -> BenchRow:
    def optional(name: str) -> int | None:
        return row.count(name) if row.has(name) else None

    return BenchRow(
        row.text("method"),
        row.positive("retained") if row.has("retained") else None,
        int(row.positive("batch")),
        row.count("images"),
        int(row.positive("prompt_tokens")),
        row.positive("ttft_s"),
        row.positive("tokens_per_s"),
        optional("kv_bytes"),
        optional("module_bytes") or 0,
        row.number("encode_s") if row.has("encode_s") else None,
        optional("peak_bytes"),
        row.text("decode") if row.has("decode") else None,
    )
