"""The demo's tables: answers side by side, and what each side costs."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from capsight.blindsight import PrefillFlops
from capsight.cli.demo_sides import Pace, Side
from capsight.cli.output import human_bytes
from capsight.evaluation import Ask, Item, exact_match


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
        "first token": [_first_token(full.eager)],
        "decode": [_speed(full.eager)],
        "decode, compiled": [_speed(full.compiled)],
    }
    for side in others:
        nbytes, total = side.answers.nbytes.kv, side.answers.nbytes.kv + side.module_nbytes
        rows["KV cache"].append(_beside(nbytes, kv))
        rows["with modules"].append(_beside(total, kv))
        saved, less = round(100 * side.flops.saved), round(100 * side.flops.attention_saved)
        rows["prefill"].append(f"{_total(side.flops) / 1e9:.2f} GFLOP ({-saved}%)")
        rows["of it attention"].append(f"{side.flops.attention / 1e9:.2f} GFLOP ({-less}%)")
        rows["first token"].append(_first_token(side.eager))
        rows["decode"].append(_speed(side.eager))
        rows["decode, compiled"].append(_speed(side.compiled))
    return {name: cells for name, cells in rows.items() if any(cells)}


def _first_token(pace: Pace) -> str:
    return f"{pace.timing.ttft_s * 1e3:.0f} ms ({pace.ratios.ttft_s:.2f}x)"


def _speed(pace: Pace | None) -> str:
    return "" if pace is None else f"{pace.timing.tokens_per_s:.0f} tok/s ({pace.ratios.tokens_per_s:.2f}x)"


def _beside(nbytes: int, full: int) -> str:
    """Bytes, and how many times as few or as many as of the full cache."""
    more = nbytes > full
    times = nbytes / full if more else full / nbytes
    return f"{human_bytes(nbytes)} ({times:.2f}x {'larger' if more else 'smaller'})"


def _total(flops: PrefillFlops) -> int:
    """FLOPs of the language model's prefill, attention and linear layers."""
    return flops.attention + flops.linear
