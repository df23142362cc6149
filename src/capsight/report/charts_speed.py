"""Charts of a benchmark: decode speed against batch, time to first token against prompt length."""

from __future__ import annotations

from collections import defaultdict

from matplotlib.axes import Axes

from capsight.evaluation.bench_row import BenchRow
from capsight.report.inputs import FULL, BenchFile
from capsight.report.svg import INK, MARKERS, SERIES, for_both, inline, legend, new_figure


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
        own = sorted((x, y) for row, x, y in points if row.name == method)
        if own:
            axes.plot(
                [x for x, _ in own],
                [y for _, y in own],
                label="full cache" if method == FULL else method,
                color=INK if method == FULL else SERIES[(index - 1) % len(SERIES)],
                marker=MARKERS[index % len(MARKERS)],
                linestyle="--" if method == FULL else "-",
                linewidth=1.6,
                markersize=5,
            )
