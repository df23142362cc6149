"""Markdown pieces that the generated pages share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

GENERATED = "<!-- made by benchmarks/write_pages.py from benchmarks/results; do not edit -->"


def table(heads: Sequence[str], rows: Iterable[Sequence[str]], text_columns: int = 1) -> list[str]:
    """Lines of a table whose first columns are text and whose others are numbers."""
    rules = ["---" if i < text_columns else "--:" for i in range(len(heads))]
    return [f"| {' | '.join(cells)} |" for cells in (heads, rules, *rows)]


def human_bytes(count: float) -> str:
    """Bytes as B, KB, MB or GB (powers of 1000)."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f} B"


def apart(ratio: float, more: str = "faster") -> str:
    """A ratio in words: "12 % slower", "less than 1 % faster"; `more` is what is said of ratios above 1."""
    less = {"faster": "slower", "later": "earlier"}[more]
    size = f"{abs(ratio - 1):.0%}"
    size = "less than 1%" if size == "0%" else size
    return f"{size} {more if ratio > 1 else less}".replace("%", " %")


def speed(ratio: float) -> str:
    """A ratio of speeds in words: "38 % slower", "2.27x as fast", "11.4x as long", "equal"."""
    if ratio >= 2:
        return f"{ratio:.2f}x as fast"
    if ratio < 0.5:
        return f"{1 / ratio:.1f}x as long"
    return "equal" if f"{ratio:.2f}" == "1.00" else apart(ratio)


def p_value(p: float) -> str:
    """A p-value as people write it."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def machine(values: Mapping[str, Any]) -> str:
    """One line on what a file was measured on."""
    where = values.get("gpu") or f"{values.get('cpu', 'CPU')}, {values.get('cores', '?')} cores"
    versions = ", ".join(f"{k} {values[k]}" for k in ("torch", "transformers", "capsight") if k in values)
    return f"Measured on {where}, {values.get('threads', '?')} threads; {versions}."
