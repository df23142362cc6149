"""Charts of accuracy against bytes, and of speed and memory, as SVG."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes

from capsight.evaluation.bench_row import BenchRow
from capsight.evaluation.stock import GRAPH
from capsight.report.inputs import FULL, BenchFile, Cell, EvalFile, MethodRow
from capsight.report.svg import INK, MARKERS, MUTED, SERIES, for_both, inline, legend, new_figure

MOST_GROUPED = 6
"""Methods in a grouped chart, the full cache included; the table below it has all."""

NEAR = 1.25
"""Rows whose bytes differ by no more than this factor are compared as equal."""


def methods_of(file: EvalFile, ours: str) -> list[str]:
    """The methods beside the full cache, `ours` first."""
    methods = dict.fromkeys(row.method for row in file.rows if row.name != FULL)
    return sorted(methods, key=lambda method: method != ours)


@for_both
def curves(file: EvalFile, ours: str, name: str, phone: bool = False) -> str:
    """Exact match against KV bytes, one line per method, with 95 % intervals."""
    figure, (axes,) = new_figure(8.6, 4.4, phone=phone)
    full = file.full
    axes.axhspan(*full.interval, color=MUTED, alpha=0.12, linewidth=0)
    axes.axhline(full.exact_match, color=INK, linewidth=1.4, linestyle="--", label="full cache")
    for index, method in enumerate(methods_of(file, ours)):
        rows = sorted((r for r in file.rows if r.method == method), key=lambda r: r.share)
        axes.errorbar(
            [100 * row.share for row in rows],
            [row.exact_match for row in rows],
            yerr=_errors(rows),
            label=method,
            zorder=10 if method == ours else 3,
            **_style(index, method == ours),
        )
    axes.set_xlabel("KV cache, % of the full cache's bytes")
    axes.set_ylabel("right answers, %")
    axes.set_xlim(left=0)
    legend(figure, axes, phone)
    return inline(figure, name, "Right answers against KV cache bytes for each method, with 95 % intervals")


def comparable(file: EvalFile, chosen: MethodRow) -> list[MethodRow]:
    """The full cache, `chosen`, and of every other method the row of about the same bytes, best first."""
    others = []
    for method in methods_of(file, chosen.method)[1:]:
        rows = [row for row in file.rows if row.method == method]
        nearest = min(rows, key=lambda row: abs(row.share - chosen.share))
        if 1 / NEAR <= nearest.share / chosen.share <= NEAR:
            others.append(nearest)
    others.sort(key=lambda row: -row.exact_match)
    return [file.full, chosen, *others]


@for_both
def by_group(
    file: EvalFile,
    rows: Sequence[MethodRow],
    ours: str,
    group: str,
    label: str,
    name: str,
    phone: bool = False,
) -> str:
    """Exact match per value of a group, one mark per method, with 95 % intervals.

    Args:
        file: gives the methods their colours, the same as in `curves`.
        rows: what to draw, the full cache first.
        ours: the method to stress.
        group: "images" or "task".
        label: of the axis.
        name: unique on the page.
    """
    rows, methods = rows[:MOST_GROUPED], methods_of(file, ours)
    values = list(rows[0].by[group])
    figure, (axes,) = new_figure(8.6, 1.1 + 0.17 * len(values) * len(rows), phone=phone)
    for index, row in enumerate(rows):
        cells = [row.by[group][value] for value in values]
        at = [i + (index - (len(rows) - 1) / 2) * 0.8 / len(rows) for i in range(len(values))]
        if index:
            style = _style(methods.index(row.method), row.method == ours)
        else:
            style = _style(0, False) | {"color": INK}
        axes.errorbar(
            [cell.exact_match for cell in cells],
            at,
            xerr=_errors(cells),
            label="full cache" if row.name == FULL else row.name,
            **style | {"linestyle": "none"},
        )
    axes.set_yticks(range(len(values)), values)
    axes.set_ylim(len(values) - 0.5, -0.5)
    axes.set_xlabel("right answers, %")
    axes.set_ylabel(label)
    _separate(axes, len(values))
    legend(figure, axes, phone)
    return inline(figure, name, f"Right answers by {label} and method, with 95 % intervals")


def _separate(axes: Axes, groups: int) -> None:
    axes.grid(False, axis="y")
    for index in range(groups - 1):
        axes.axhline(index + 0.5, color=MUTED, alpha=0.25, linewidth=0.6)


def _errors(cells: Sequence[Cell]) -> list[list[float]]:
    below = [max(cell.exact_match - cell.interval[0], 0) for cell in cells]
    return [below, [max(cell.interval[1] - cell.exact_match, 0) for cell in cells]]


def _style(index: int, strong: bool) -> dict[str, Any]:
    """Colour, marker and line of series `index`; beyond the colours there are, lines are dotted."""
    return {
        "color": SERIES[index % len(SERIES)],
        "marker": MARKERS[index % len(MARKERS)],
        "markersize": 6 if strong else 4.5,
        "linewidth": 2.4 if strong else 1.2,
        "linestyle": "-" if index < len(SERIES) else ":",
        "elinewidth": 1.0,
        "capsize": 2,
    }


def speed_rows(file: BenchFile) -> list[BenchRow]:
    """The rows to draw against batch: those of the image count measured at most batches."""
    batches: dict[int, set[int]] = defaultdict(set)
    for row in file.rows:
        batches[row.images].add(row.batch)
    images = max(batches, key=lambda n: (len(batches[n]), n))
    return [row for row in file.rows if row.images == images] if len(batches[images]) > 1 else []


def ttft_rows(file: BenchFile) -> list[BenchRow]:
    """The rows to draw against prompt length: those of the batch measured at most lengths."""
    lengths: dict[int, set[int]] = defaultdict(set)
    for row in file.rows:
        lengths[row.batch].add(row.prompt_tokens)
    batch = max(lengths, key=lambda b: (len(lengths[b]), -b))
    return [row for row in file.rows if row.batch == batch] if len(lengths[batch]) > 1 else []


@for_both
def speed(file: BenchFile, name: str, phone: bool = False) -> str:
    """Tokens per second against batch, one line per method."""
    figure, (axes,) = new_figure(8.6, 3.6, phone=phone)
    _lines(axes, file, [(row, row.batch, row.tokens_per_s) for row in speed_rows(file)])
    axes.set_xscale("log", base=2)
    ticks = sorted({row.batch for row in speed_rows(file)})
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set_xlabel("batch")
    axes.set_ylabel("tokens per second")
    axes.set_ylim(bottom=0)
    legend(figure, axes, phone)
    return inline(figure, name, "Decoded tokens per second against batch, for each method")


@for_both
def ttft(file: BenchFile, name: str, phone: bool = False) -> str:
    """Seconds to the first token against prompt length, one line per method."""
    figure, (axes,) = new_figure(8.6, 3.6, phone=phone)
    _lines(axes, file, [(row, row.prompt_tokens, row.ttft_s) for row in ttft_rows(file)])
    axes.set_xlabel("prompt tokens")
    axes.set_ylabel("seconds to the first token")
    axes.set_ylim(bottom=0)
    legend(figure, axes, phone)
    return inline(figure, name, "Seconds to the first token against prompt length, for each method")


def _lines(axes: Axes, file: BenchFile, points: list[tuple[BenchRow, float, float]]) -> None:
    for index, method in enumerate(file.names()):
        curve = sorted((x, y) for row, x, y in points if row.name == method)
        if curve:
            full = method in (FULL, FULL + GRAPH)
            axes.plot(
                [x for x, _ in curve],
                [y for _, y in curve],
                label=method.replace(FULL, "full cache") if full else method,
                color=INK if full else SERIES[(index - 1) % len(SERIES)],
                marker=MARKERS[index % len(MARKERS)],
                linestyle="--" if full else "-",
                linewidth=1.6,
                markersize=5,
            )
