"""Small pictures for the first lessons in reading: a few vision tokens, nearly all of them with content.

On a page of 64 to 128 tokens a question's attention starts out spread over mostly blank paper; on a
snippet of 4 to 24 tokens there is less to spread it over.
"""

import random
from typing import Any

from capsight.reference.drawing.canvas import Canvas
from capsight.reference.drawing.palette import COLORS, ITEMS, LABELS, jitter, light, random_code, random_font
from capsight.reference.drawing.scene import Scene
from capsight.reference.drawing.shapes import SHAPES, draw_shape

CELL = 28


def _plate(rng: random.Random) -> tuple[Canvas, dict[str, Any]]:
    code, font = random_code(rng, 4, 6), random_font(rng, 18, 25)
    probe = Canvas.text_width(code, font)
    canvas = Canvas(rng, CELL * (int(probe + 16) // CELL + 1), 2 * CELL, light(rng, 215))
    x = rng.uniform(4, canvas.width - probe - 4)
    canvas.text(x, rng.uniform(14, 42), code, font, jitter(rng, COLORS[rng.choice(("black", "blue", "red"))]))
    return canvas, {"code": code}


def _shapes(rng: random.Random) -> tuple[Canvas, dict[str, Any]]:
    count = rng.randint(1, 3)
    canvas = Canvas(rng, 2 * CELL * count, 2 * CELL, light(rng, 228))
    facts = []
    for k in range(count):
        shape, color, r = rng.choice(SHAPES), rng.choice(list(COLORS)), rng.uniform(12, 21)
        x, y = 2 * CELL * k + rng.uniform(r + 2, 2 * CELL - r - 2), rng.uniform(r + 2, 2 * CELL - r - 2)
        draw_shape(canvas, shape, x, y, r, jitter(rng, COLORS[color]))
        canvas.mark(shape, color, x, y)
        facts.append((shape, color))
    return canvas, {"shapes": facts}


def _card(rng: random.Random) -> tuple[Canvas, dict[str, Any]]:
    canvas = Canvas(rng, 7 * CELL, 3 * CELL, light(rng, 225))
    codes = {label: random_code(rng, 4, 5) for label in rng.sample(LABELS, 2)}
    font, y = random_font(rng, 15, 17), rng.uniform(14, 24)
    for label, code in codes.items():
        canvas.text(6, y, label, font, jitter(rng, (60, 60, 60), 40))
        ink = jitter(rng, COLORS[rng.choice(("black", "blue", "red", "purple", "green"))])
        canvas.text(rng.uniform(84, 96), y, code, random_font(rng, 18, 22), ink)
        y += rng.uniform(32, 40)
    return canvas, {"codes": codes}


def _receipt(rng: random.Random) -> tuple[Canvas, dict[str, Any]]:
    canvas = Canvas(rng, 6 * CELL, 3 * CELL, light(rng, 240))
    items = rng.sample(ITEMS, 2)
    prices = {i: f"{c / 100:.2f}" for i, c in zip(items, rng.sample(range(50, 1000, 5), 2), strict=True)}
    font, ink, y = random_font(rng, 15, 19), jitter(rng, (40, 40, 40), 25), rng.uniform(14, 24)
    for item, price in prices.items():
        canvas.text(6, y, item, font, ink)
        canvas.text(160 - canvas.text_width(price, font), y, price, font, ink)
        y += rng.uniform(28, 36)
    return canvas, {"prices": prices}


def _table(rng: random.Random) -> tuple[Canvas, dict[str, Any]]:
    canvas = Canvas(rng, 4 * CELL, 4 * CELL, light(rng, 235))
    font, ink = random_font(rng, 15, 19), jitter(rng, COLORS[rng.choice(("black", "blue", "purple"))])
    cells = {(row, column): str(rng.randint(10, 99)) for row in "AB" for column in (1, 2)}
    for k in (1, 2):
        canvas.text(12 + 36 * k, 16, str(k), font, ink)
        canvas.text(8, 16 + 36 * k, "AB"[k - 1], font, ink)
    for (row, column), value in cells.items():
        canvas.text(8 + 36 * column, 16 + 36 * ("AB".index(row) + 1), value, font, ink)
    return canvas, {"cells": cells}


_PAINTERS = {"plate": _plate, "shapes": _shapes, "card": _card, "receipt": _receipt, "table": _table}


def snippet(rng: random.Random) -> Scene:
    """Draw one small picture of a kind that the questions know."""
    kind = rng.choice(list(_PAINTERS))
    canvas, facts = _PAINTERS[kind](rng)
    return Scene(kind, canvas.image, facts, tuple(canvas.glyphs), tuple(canvas.marks))
