"""A table of two-digit numbers with lettered rows and numbered columns."""

import random
from typing import Any

from capsight.reference.drawing.canvas import CELL, Canvas
from capsight.reference.drawing.palette import COLORS, jitter, light, random_font


def paint(rng: random.Random, width: int, height: int) -> tuple[Canvas, dict[str, Any]]:
    """Draw a table; facts: ``cells`` {(row letter, column number): "dd"}."""
    canvas = Canvas(rng, width, height, light(rng, 235))
    most_rows, most_columns = min(4, canvas.rows - 1), min(4, canvas.columns - 1)
    rows = rng.randint(min(2, most_rows), most_rows)
    columns = rng.randint(min(2, most_columns), most_columns)
    step = rng.choice((1, 2)) if 2 * columns + 1 <= canvas.columns else 1
    wide, tall = step * columns + 1, rows + 1
    left, top = rng.randint(0, canvas.columns - wide), rng.randint(0, canvas.rows - tall)
    box = (CELL * left, CELL * top, CELL * (left + wide) - 1, CELL * (top + tall) - 1)
    head = jitter(rng, rng.choice(((205, 220, 240), (225, 235, 210), (240, 225, 205))), 10)
    canvas.draw.rectangle((*box[:3], box[1] + CELL - 1), fill=head)
    canvas.draw.rectangle((*box[:2], box[0] + CELL - 1, box[3]), fill=head)
    line = jitter(rng, (170, 170, 170), 30)
    for i in range(tall + 1):
        canvas.draw.line((box[0], box[1] + CELL * i, box[2], box[1] + CELL * i), fill=line)
    for j in (0, *range(1, wide + 1, step)):
        canvas.draw.line((box[0] + CELL * j, box[1], box[0] + CELL * j, box[3]), fill=line)
    font, ink = random_font(rng, 15, 18), jitter(rng, COLORS[rng.choice(("black", "blue", "purple"))])
    cells: dict[tuple[str, int], str] = {}
    for j in range(columns):
        canvas.text(left + 1 + step * j, top, str(j + 1), font, ink)
    for i in range(rows):
        letter = "ABCD"[i]
        canvas.text(left, top + i + 1, letter, font, ink)
        for j in range(columns):
            cells[letter, j + 1] = value = str(rng.randint(10, 99))
            canvas.text(left + 1 + step * j, top + i + 1, value, font, ink, f"{letter}{j + 1}")
    return canvas, {"cells": cells}
