"""A table of two-digit numbers with lettered rows and numbered columns."""

import random
from typing import Any

from capsight.reference.drawing.canvas import Canvas
from capsight.reference.drawing.palette import COLORS, jitter, light, random_font


def paint(rng: random.Random, width: int, height: int) -> tuple[Canvas, dict[str, Any]]:
    """Draw a table; facts: ``cells`` {(row letter, column number): "dd"}."""
    canvas = Canvas(rng, width, height, light(rng, 235))
    rows, columns = rng.randint(3, 4), rng.randint(3, 4)
    cell_w, cell_h = rng.randint(36, 41), rng.randint(30, 38)
    full_w, full_h = cell_w * (columns + 1), cell_h * (rows + 1)
    left, top = rng.randint(4, width - full_w - 4), rng.randint(4, height - full_h - 4)
    head = jitter(rng, rng.choice(((205, 220, 240), (225, 235, 210), (240, 225, 205))), 10)
    canvas.draw.rectangle((left, top, left + full_w, top + cell_h), fill=head)
    canvas.draw.rectangle((left, top, left + cell_w, top + full_h), fill=head)
    line = jitter(rng, (150, 150, 150), 30)
    for i in range(rows + 2):
        canvas.draw.line((left, top + i * cell_h, left + full_w, top + i * cell_h), fill=line)
    for j in range(columns + 2):
        canvas.draw.line((left + j * cell_w, top, left + j * cell_w, top + full_h), fill=line)
    font, head_font = random_font(rng, 15, 19), random_font(rng, 15, 19)
    ink = jitter(rng, COLORS[rng.choice(("black", "blue", "purple"))])

    def put(i: int, j: int, text: str, bold: bool) -> None:
        used = head_font if bold else font
        x = left + (j + 0.5) * cell_w - canvas.text_width(text, used) / 2
        canvas.text(x, top + (i + 0.5) * cell_h, text, used, ink)

    cells: dict[tuple[str, int], str] = {}
    for j in range(columns):
        put(0, j + 1, str(j + 1), True)
    for i in range(rows):
        letter = "ABCD"[i]
        put(i + 1, 0, letter, True)
        for j in range(columns):
            cells[letter, j + 1] = str(rng.randint(10, 99))
            put(i + 1, j + 1, cells[letter, j + 1], False)
    return canvas, {"cells": cells}
