"""A bar chart: coloured bars with their values written below them."""

import random
from typing import Any

from capsight.reference.drawing.canvas import CELL, Canvas
from capsight.reference.drawing.palette import COLORS, jitter, light, random_font

_MOST_LEVELS = 5


def paint(rng: random.Random, width: int, height: int) -> tuple[Canvas, dict[str, Any]]:
    """Draw a chart; facts: ``bars`` {colour: value}; the highest and the lowest bar are a level apart."""
    canvas = Canvas(rng, width, height, light(rng, 240))
    most, top_level = min(4, canvas.columns // 2), min(_MOST_LEVELS, canvas.rows - 1)
    colors = rng.sample(list(COLORS), rng.randint(min(3, most), most))
    while True:
        levels = [rng.randint(1, top_level) for _ in colors]
        if levels.count(max(levels)) == 1 and levels.count(min(levels)) == 1:
            break
    span = 90 // top_level
    values = [rng.randint(max(10, span * k), span * k + 9) for k in levels]
    wide = 2 * len(colors)
    left = rng.randint(0, canvas.columns - wide)
    base = CELL * rng.randint(top_level, canvas.rows - 1)
    grid = (215, 215, 215)
    for level in range(1, top_level + 1):
        y = base - CELL * level
        canvas.draw.line((CELL * left, y, CELL * (left + wide), y), fill=grid)
    axis = jitter(rng, (60, 60, 60), 20)
    canvas.draw.line((CELL * left, base - 1, CELL * (left + wide), base - 1), fill=axis)
    font, half = random_font(rng, 15, 17), rng.uniform(9, 13)
    for k, (color, level, value) in enumerate(zip(colors, levels, values, strict=True)):
        x, top = CELL * (left + 2 * k + 0.5), base - CELL * level + rng.uniform(0, 4)
        canvas.draw.rectangle((x - half, top, x + half, base - 2), fill=jitter(rng, COLORS[color]))
        for cell in range(level):
            canvas.mark("bar", color, x, base - CELL * (cell + 0.5))
        canvas.text(left + 2 * k, base // CELL, str(value), font, axis, color)
    return canvas, {"bars": dict(zip(colors, values, strict=True))}
