"""The JSON of `capsight bench --json`: rows of one method, batch and prompt each."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from capsight.report.eval_file import FULL
from capsight.report.fields import Fields

_WRITER = "capsight bench --json"


@dataclass(frozen=True, slots=True)
class BenchRow:
    """One measurement; the file is `{"rows": [...], "machine": {...}}` with these fields in each row.

    Attributes:
        method: "full", or a method's name without its retained fraction.
        retained: fraction kept; null (or left out) for "full".
        batch: rows of the batch.
        images: images in each prompt.
        prompt_tokens: tokens of each prompt.
        ttft_s: seconds to the first token, median.
        tokens_per_s: new tokens per second after the first, all rows together, median.
        kv_bytes: of the KV cache of the whole batch; null (or left out) where it was not measured.
        peak_bytes: peak memory of the run; null (or left out) where it was not measured.
    """

    method: str
    retained: float | None
    batch: int
    images: int
    prompt_tokens: int
    ttft_s: float
    tokens_per_s: float
    kv_bytes: int | None
    peak_bytes: int | None

    @property
    def name(self) -> str:
        """As `capsight eval` writes it, such as "adaptive 0.4"."""
        return self.method if self.retained is None else f"{self.method} {self.retained:g}"


@dataclass(frozen=True, slots=True)
class BenchFile:
    """One benchmark run.

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
        CapsuleFileError: it cannot be read, or is not as described at `BenchRow`.
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
        optional("peak_bytes"),
    )
