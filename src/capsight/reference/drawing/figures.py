"""Pages of marks: a bar chart with its values, and scattered shapes."""

import math
import random
from typing import Any

from capsight.reference.drawing.canvas import CELL, Canvas
from capsight.reference.drawing.palette import (
    COLORS,
    RGB,
    jitter,
    light,
    random_font,
)

_MOST_LEVELS = 5


def chart(rng: random.Random, width: int, height: int) -> tuple[Canvas, dict[str, Any]]:
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


SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")


def draw_shape(canvas: Canvas, shape: str, x: float, y: float, r: float, fill: RGB) -> None:
    """Draw one of `SHAPES` of radius `r` px around (x, y)."""
    pen = canvas.draw
    if shape == "circle":
        pen.ellipse((x - r, y - r, x + r, y + r), fill=fill)
    elif shape == "square":
        pen.rectangle((x - 0.85 * r, y - 0.85 * r, x + 0.85 * r, y + 0.85 * r), fill=fill)
    elif shape == "triangle":
        pen.polygon([(x, y - r), (x - r, y + 0.8 * r), (x + r, y + 0.8 * r)], fill=fill)
    elif shape == "star":
        spokes = [(r if k % 2 == 0 else 0.42 * r, math.pi * (k / 5 - 0.5)) for k in range(10)]
        pen.polygon([(x + s * math.cos(a), y + s * math.sin(a)) for s, a in spokes], fill=fill)
    elif shape == "cross":
        pen.rectangle((x - r, y - 0.33 * r, x + r, y + 0.33 * r), fill=fill)
        pen.rectangle((x - 0.33 * r, y - r, x + 0.33 * r, y + r), fill=fill)
    else:
        pen.ellipse((x - r, y - r, x + r, y + r), outline=fill, width=max(4, round(0.35 * r)))


def shapes(rng: random.Random, width: int, height: int) -> tuple[Canvas, dict[str, Any]]:
    """Draw 2 to 4 shapes, each in a cell of its own; facts: ``shapes`` [(shape, colour), ...]."""
    canvas = Canvas(rng, width, height, light(rng, 228))
    few = rng.sample(SHAPES, rng.randint(2, 4))
    tints = rng.sample(list(COLORS), rng.randint(2, 4))
    cells = rng.sample(
        range(canvas.columns * canvas.rows), rng.randint(2, min(4, canvas.columns * canvas.rows))
    )
    facts: list[tuple[str, str]] = []
    for cell in cells:
        r = rng.uniform(9, 13)
        x = CELL * (cell % canvas.columns + 0.5) + rng.uniform(r - 13.5, 13.5 - r)
        y = CELL * (cell // canvas.columns + 0.5) + rng.uniform(r - 13.5, 13.5 - r)
        shape, color = rng.choice(few), rng.choice(tints)
        draw_shape(canvas, shape, x, y, r, jitter(rng, COLORS[color]))
        canvas.mark(shape, color, x, y)
        facts.append((shape, color))
    return canvas, {"shapes": facts}
