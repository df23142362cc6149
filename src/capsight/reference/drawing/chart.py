"""A bar chart: coloured bars of height 1 to 9 over a labelled axis."""

import random
from typing import Any

from capsight.reference.drawing.canvas import Canvas
from capsight.reference.drawing.palette import COLORS, jitter, light, random_font


def paint(rng: random.Random, width: int, height: int) -> tuple[Canvas, dict[str, Any]]:
    """Draw a chart; facts: ``bars`` {colour: height}; the highest and the lowest bar are unique."""
    canvas = Canvas(rng, width, height, light(rng, 240))
    colors = rng.sample(list(COLORS), rng.randint(3, 5))
    while True:
        heights = [rng.randint(1, 9) for _ in colors]
        if heights.count(max(heights)) == 1 and heights.count(min(heights)) == 1:
            break
    unit = rng.randint(15, 19)
    left, base = rng.randint(24, width - 196), rng.randint(10 * unit + 2, height - 12)
    axis, grid = jitter(rng, (60, 60, 60), 20), (215, 215, 215)
    font = random_font(rng, 13, 14)
    for level in range(1, 10):
        canvas.draw.line((left, base - level * unit, left + 184, base - level * unit), fill=grid)
        canvas.text(left - 14, base - level * unit, str(level), font, axis)
    canvas.draw.line((left, base, left + 184, base), fill=axis)
    canvas.draw.line((left, base, left, base - 9.5 * unit), fill=axis)
    step = 184 / len(colors)
    bar = rng.uniform(0.5, 0.8) * step
    for k, (color, value) in enumerate(zip(colors, heights, strict=True)):
        x = left + (k + 0.5) * step
        top = base - value * unit
        canvas.draw.rectangle((x - bar / 2, top, x + bar / 2, base), fill=jitter(rng, COLORS[color]))
        canvas.mark("bar", color, x, top)
    return canvas, {"bars": dict(zip(colors, heights, strict=True))}
