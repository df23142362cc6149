"""A till receipt: items, prices and a total."""

import random
from typing import Any

from capsight.reference.drawing.canvas import CELL, Canvas
from capsight.reference.drawing.palette import ITEMS, jitter, light, random_face


def paint(rng: random.Random, width: int, height: int) -> tuple[Canvas, dict[str, Any]]:
    """Draw a receipt; facts: ``prices`` {item: "d.dd"} and ``total`` "d.dd" or "dd.dd"."""
    canvas = Canvas(rng, width, height, light(rng, 200, 240))
    most = min(5, canvas.rows - 1)
    items = rng.sample(ITEMS, rng.randint(min(2, most), most))
    units = rng.sample(range(1, 10), len(items))  # no two prices begin with the same digit
    cents = [100 * unit + 5 * rng.randrange(20) for unit in units]
    prices = {item: f"{c / 100:.2f}" for item, c in zip(items, cents, strict=True)}
    total = f"{sum(cents) / 100:.2f}"
    tall = len(items) + 1
    left, top = rng.randint(0, canvas.columns - 6), rng.randint(0, canvas.rows - tall)
    box = (CELL * left, CELL * top, CELL * (left + 6) - 1, CELL * (top + tall) - 1)
    canvas.draw.rectangle(box, fill=(252, 252, 250))
    face, ink = random_face(rng, 14, 17), jitter(rng, (40, 40, 40), 25)
    for k, (name, price) in enumerate([*prices.items(), ("total", total)]):
        if name == "total":
            y = CELL * (top + k)
            canvas.draw.line((CELL * left + 4, y, CELL * (left + 6) - 5, y), fill=ink)
        canvas.word(left, top + k, name, face, ink)
        canvas.text(left + 3, top + k, price, face.font(), ink, name)
    return canvas, {"prices": prices, "total": total}
