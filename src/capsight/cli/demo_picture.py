"""The demo's picture: numbered images, questions with every side's answers, and what each side costs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from io import BytesIO

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.table import Table

from capsight.cli.demo_sides import Side
from capsight.cli.demo_tables import side_costs
from capsight.evaluation import Item, exact_match

_COLUMNS = 4
_ROW = 0.32
"""Inches that a row of a table is high."""
_PAD = 0.03
"""Left of a cell's text, as a part of the cell's width."""


def draw_demo(item: Item, sides: Sequence[Side]) -> bytes:
    """A PNG.

    Args:
        item: the images and questions.
        sides: answers in the order of the questions; the full cache first, the others compared with it.
    """
    rows, costs = math.ceil(len(item.images) / _COLUMNS), side_costs(sides)
    heights = [2.7 * rows, _ROW * (len(item.asks) + 2), _ROW * (len(costs) + 2)]
    figure = Figure(figsize=(12, sum(heights)), layout="constrained")
    FigureCanvasAgg(figure)
    top, middle, bottom = figure.subfigures(3, 1, height_ratios=heights)  # type: ignore[misc]
    axes = top.subplots(rows, min(_COLUMNS, len(item.images)), squeeze=False).ravel()
    for number, axis in enumerate(axes, 1):
        axis.set_axis_off()
        if number <= len(item.images):
            axis.imshow(item.images[number - 1])
            axis.set_title(f"image {number}", fontsize=9)
    names = [side.name for side in sides]
    cells = [
        [ask.question, ask.answer, *(side.answers.texts[i] for side in sides)]
        for i, ask in enumerate(item.asks)
    ]
    table = _table(middle.subplots(), cells, ["question", "right answer", *names], [0.29, 0.1])
    for i, ask in enumerate(item.asks, 1):
        for column, side in enumerate(sides, 2):
            right = exact_match(side.answers.texts[i - 1], ask.answer)
            table[i, column].get_text().set_color("#1a7f37" if right else "#cf222e")
    _table(bottom.subplots(), [[name, *row] for name, row in costs.items()], ["", *names], [0.33])
    data = BytesIO()
    figure.savefig(data, format="png", dpi=130)
    return data.getvalue()


def _table(axis: Axes, cells: list[list[str]], heads: list[str], widths: list[float]) -> Table:
    """A table over the whole width; the columns after those of `widths` share what is left."""
    axis.set_axis_off()
    rest = len(heads) - len(widths)
    shown = [[text.replace("$", r"\$") for text in row] for row in cells]  # no formulas
    table = axis.table(
        shown,
        colLabels=heads,
        colWidths=[*widths, *[(1 - sum(widths)) / rest] * rest],
        cellLoc="left",
        loc="center",
    )
    table.auto_set_font_size(False)
    table.set_fontsize(9)
    table.scale(1, 1.35)
    for cell in table.get_celld().values():
        cell.PAD = _PAD
    return table
