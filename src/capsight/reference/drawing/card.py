"""A card: up to four labelled codes, and a line of small print."""

import random
from typing import Any

from capsight.reference.drawing.canvas import CELL, Canvas
from capsight.reference.drawing.palette import (
    COLORS,
    LABELS,
    jitter,
    light,
    random_code,
    random_face,
    random_font,
)


def paint(rng: random.Random, width: int, height: int) -> tuple[Canvas, dict[str, Any]]:
    """Draw a card; facts: ``codes`` {label: code} and ``small_print``."""
    canvas = Canvas(rng, width, height, light(rng, 225))
    most = min(4, canvas.rows - 2)
    labels = rng.sample(LABELS, rng.randint(min(2, most), most))
    codes = {label: random_code(rng) for label in labels}
    small_print = random_code(rng, 5, 6)
    step = rng.choice((1, 2)) if 2 * len(labels) + 2 <= canvas.rows else 1
    tall = step * len(labels) + 2
    left, top = rng.randint(0, canvas.columns - 6), rng.randint(0, canvas.rows - tall)
    if rng.random() < 0.5:
        box = (CELL * left + 1, CELL * top + 1, CELL * (left + 6) - 2, CELL * (top + tall) - 2)
        canvas.draw.rectangle(box, outline=jitter(rng, (120, 120, 120), 60))
    face = random_face(rng, 14, 17)
    for k, (label, code) in enumerate(codes.items()):
        ink = jitter(rng, COLORS[rng.choice(("black", "blue", "red", "purple", "green"))])
        canvas.word(left, top + step * k, label, face, jitter(rng, (60, 60, 60), 40))
        canvas.text(left + 3, top + step * k, code, random_font(rng, 16, 20), ink, label)
    ink = jitter(rng, (70, 70, 70), 25)
    column, font = left + rng.randint(0, 3), random_font(rng, 12, 13)
    canvas.text(column, top + tall - 1, small_print, font, ink, "small print")
    return canvas, {"codes": codes, "small_print": small_print}
