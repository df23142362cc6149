"""A till receipt: items, prices and a total."""

import random
from typing import Any

from capsight.reference.drawing.canvas import Canvas
from capsight.reference.drawing.palette import ITEMS, jitter, light, random_font


def paint(rng: random.Random, width: int, height: int) -> tuple[Canvas, dict[str, Any]]:
    """Draw a receipt; facts: ``prices`` {item: "d.dd"} and ``total`` "d.dd" or "dd.dd"."""
    canvas = Canvas(rng, width, height, light(rng, 200, 240))
    items = rng.sample(ITEMS, rng.randint(3, 5))
    cents = rng.sample(range(50, 1000, 5), len(items))
    prices = {item: f"{c / 100:.2f}" for item, c in zip(items, cents, strict=True)}
    total = f"{sum(cents) / 100:.2f}"
    left, top = rng.randint(8, width - 196), rng.randint(4, height - 208)
    rows = len(items) + 1
    gap = rng.uniform(27, 32)
    bottom = top + 16 + gap * rows
    canvas.draw.rectangle((left, top, left + 186, bottom), fill=(252, 252, 250))
    font = random_font(rng, 15, 19)
    ink = jitter(rng, (40, 40, 40), 25)
    y = top + 18.0
    for name, price in [*prices.items(), ("total", total)]:
        if name == "total":
            canvas.draw.line((left + 8, y - gap / 2, left + 178, y - gap / 2), fill=ink)
        canvas.text(left + 10, y, name, font, ink)
        canvas.text(left + 176 - canvas.text_width(price, font), y, price, font, ink)
        y += gap
    return canvas, {"prices": prices, "total": total}
