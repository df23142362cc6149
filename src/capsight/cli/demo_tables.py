"""The demo's tables: answers side by side, and what each side costs."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from capsight.blindsight import PrefillFlops
from capsight.cli.demo_sides import Side
from capsight.cli.output import human_bytes
from capsight.evaluation import Ask, Item, exact_match
from capsight.evaluation.timing import Timing


def print_demo(console: Console, item: Item, sides: Sequence[Side]) -> None:
    """Print both tables.

    Args:
        console: where to.
        item: images and questions.
        sides: the full cache first; the others are compared with it.
    """
    title = f"{len(item.images)} image{'s' * (len(item.images) != 1)}"
    answers = Table("question", "right answer", *(s.name for s in sides), title=title)
    for i, ask in enumerate(item.asks):
        answers.add_row(ask.question, ask.answer, *(_verdict(s.answers.texts[i], ask) for s in sides))
    console.print(answers)
    costs = Table(Column("", no_wrap=True), *(side.name for side in sides))
    for name, cells in side_costs(sides).items():
        costs.add_row(name, *cells)
    console.print(costs)


def _verdict(answer: str, ask: Ask) -> Text:
    mark = ("✓", "green") if exact_match(answer, ask.answer) else ("✗", "red")
    return Text.assemble(mark, f" {answer}")


def side_costs(sides: Sequence[Side]) -> dict[str, list[str]]:
    """What each side costs: rows by name, a cell for each side, the full cache first."""
    full, *others = sides
    kv = full.answers.nbytes.kv
    rows = {
        "KV cache": [human_bytes(kv)],
        "with modules": [human_bytes(kv)],
        "prefill": [f"{_total(full.flops) / 1e9:.2f} GFLOP"],
        "of it attention": [f"{full.flops.attention / 1e9:.2f} GFLOP"],
        "first token": [f"{full.timing.ttft_s * 1e3:.0f} ms"],
        "decode": [f"{full.timing.tokens_per_s:.0f} tok/s"],
    }
    for side in others:
        nbytes, total = side.answers.nbytes.kv, side.answers.nbytes.kv + side.module_nbytes
        rows["KV cache"].append(_beside(nbytes, kv))
        rows["with modules"].append(_beside(total, kv))
        saved, less = round(100 * side.flops.saved), round(100 * side.flops.attention_saved)
        rows["prefill"].append(f"{_total(side.flops) / 1e9:.2f} GFLOP ({-saved}%)")
        rows["of it attention"].append(f"{side.flops.attention / 1e9:.2f} GFLOP ({-less}%)")
        rows["first token"].append(f"{side.timing.ttft_s * 1e3:.0f} ms ({side.ratios.ttft_s:.2f}x)")
        rows["decode"].append(_speed(side.timing, side.ratios))
    return rows | _other_costs(sides)


def _other_costs(sides: Sequence[Side]) -> dict[str, list[str]]:
    """Rows on the way to decode that was timed besides, empty where a side was not."""
    full, others = sides[0], [side.other for side in sides]
    names = [other.decode for other in others if other is not None]
    if not names:
        return {}
    kv = full.answers.nbytes.kv
    rows: dict[str, list[str]] = {f"decode, {names[0]}": [], "its KV cache": []}
    for other in others:
        cells = ("", "")
        if other is not None:
            cells = _speed(other.timing, other.ratios), _beside(other.kv_bytes, kv)
        for row, cell in zip(rows.values(), cells, strict=True):
            row.append(cell)
    return rows


def _speed(timing: Timing, ratios: Timing) -> str:
    return f"{timing.tokens_per_s:.0f} tok/s ({ratios.tokens_per_s:.2f}x)"


def _beside(nbytes: int, full: int) -> str:
    """Bytes, and how many times as few or as many as of the full cache."""
    more = nbytes > full
    times = nbytes / full if more else full / nbytes
    return f"{human_bytes(nbytes)} ({times:.2f}x {'larger' if more else 'smaller'})"


def _total(flops: PrefillFlops) -> int:
    """FLOPs of the language model's prefill, attention and linear layers."""
    return flops.attention + flops.linear
