"""The demo's picture: the images, numbered, and the questions with every side's answers below."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from capsight.evaluation import Item, exact_match

_COLUMNS = 4


def draw_demo(path: Path, item: Item, answers: Mapping[str, Sequence[str]]) -> None:
    """Write a PNG.

    Args:
        path: where to.
        item: the images and questions.
        answers: answers in the order of the questions, by name of the side.
    """
    rows = math.ceil(len(item.images) / _COLUMNS)
    text_height = 0.32 * (len(item.asks) + 2)
    figure = Figure(figsize=(11, 2.7 * rows + text_height), layout="constrained")
    FigureCanvasAgg(figure)
    top, bottom = figure.subfigures(2, 1, height_ratios=[2.7 * rows, text_height])  # type: ignore[misc]
    axes = top.subplots(rows, min(_COLUMNS, len(item.images)), squeeze=False).ravel()
    for number, axis in enumerate(axes, 1):
        axis.set_axis_off()
        if number <= len(item.images):
            axis.imshow(item.images[number - 1])
            axis.set_title(f"image {number}", fontsize=9)
    axis = bottom.subplots()
    axis.set_axis_off()
    cells = [
        [ask.question, ask.answer, *(side[i] for side in answers.values())] for i, ask in enumerate(item.asks)
    ]
    table = axis.table(
        cells,
        colLabels=["question", "right answer", *answers],
        colWidths=[0.4, 0.2, *[0.4 / len(answers)] * len(answers)],
        cellLoc="left",
        loc="center",
    )
    table.auto_set_font_size(False)
    table.set_fontsize(9)
    table.scale(1, 1.35)
    for i, ask in enumerate(item.asks, 1):
        for column, side in enumerate(answers.values(), 2):
            right = exact_match(side[i - 1], ask.answer)
            table[i, column].get_text().set_color("#1a7f37" if right else "#cf222e")
    figure.savefig(path, dpi=130)
