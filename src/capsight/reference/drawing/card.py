"""A card: three or four labelled codes, and a line of small print."""

import random
from typing import Any

from capsight.reference.drawing.canvas import Canvas
from capsight.reference.drawing.palette import COLORS, LABELS, jitter, light, random_code, random_font


def paint(rng: random.Random, width: int, height: int) -> tuple[Canvas, dict[str, Any]]:
    """Draw a card; facts: ``codes`` {label: code} and ``small_print``."""
    paper = light(rng, 225)
    canvas = Canvas(rng, width, height, paper)
    labels = rng.sample(LABELS, rng.randint(3, 4))
    codes = {label: random_code(rng) for label in labels}
    small_print = random_code(rng, 5, 6)
    left, top = rng.randint(6, width - 206), rng.randint(6, height - 206)
    if rng.random() < 0.5:
        canvas.draw.rectangle(
            (left - 2, top - 2, left + 200, top + 200), outline=jitter(rng, (120, 120, 120), 60)
        )
    font = random_font(rng, 15, 19)
    y: float = top + rng.randint(16, 28)
    gap = rng.uniform(34, 40)
    column = left + rng.randint(76, 88)
    for label, code in codes.items():
        ink = jitter(rng, COLORS[rng.choice(("black", "blue", "red", "purple", "green"))])
        canvas.text(left + 8, y, label, font, jitter(rng, (60, 60, 60), 40))
        canvas.text(column, y, code, random_font(rng, 18, 23), ink)
        y += gap
    canvas.text(
        left + rng.randint(8, 90),
        top + 188,
        small_print,
        random_font(rng, 13, 13),
        jitter(rng, (70, 70, 70), 25),
    )
    return canvas, {"codes": codes, "small_print": small_print}
