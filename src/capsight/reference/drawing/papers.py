"""Pages of text: a card of codes, a till receipt, a table of numbers, a name plate in clutter."""

import random
from typing import Any

from PIL import Image

from capsight.reference.drawing.canvas import CELL, PITCH, Canvas
from capsight.reference.drawing.palette import (
    COLORS,
    ITEMS,
    LABELS,
    jitter,
    light,
    random_code,
    random_face,
    random_font,
)


def card(rng: random.Random, width: int, height: int) -> tuple[Canvas, dict[str, Any]]:
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


def receipt(rng: random.Random, width: int, height: int) -> tuple[Canvas, dict[str, Any]]:
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


def table(rng: random.Random, width: int, height: int) -> tuple[Canvas, dict[str, Any]]:
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


def plate(rng: random.Random, width: int, height: int) -> tuple[Canvas, dict[str, Any]]:
    """Draw the plate; facts: ``code``, five or six characters."""
    canvas = Canvas(rng, width, height, light(rng, 120, 220))
    noise = Image.frombytes("L", (width // 4, height // 4), rng.randbytes((width // 4) * (height // 4)))
    noise = noise.resize((width, height), Image.Resampling.BILINEAR)
    canvas.image.paste(Image.blend(canvas.image, noise.convert("RGB"), rng.uniform(0.1, 0.35)))
    for _ in range(rng.randint(6, 14) * width * height // 224**2):
        x, y = rng.uniform(-20, width), rng.uniform(-20, height)
        box = (x, y, x + rng.uniform(8, 90), y + rng.uniform(8, 90))
        tint = jitter(rng, COLORS[rng.choice(list(COLORS))], 60)
        match rng.randrange(3):
            case 0:
                canvas.draw.line(box, fill=tint, width=rng.randint(1, 5))
            case 1:
                canvas.draw.ellipse(box, outline=tint, width=rng.randint(1, 4))
            case _:
                canvas.draw.rectangle(box, fill=tint)
    code = random_code(rng, 5, 6)
    column, row = rng.randint(0, canvas.columns - 3), rng.randint(0, canvas.rows - 1)
    canvas.draw.rectangle(
        (CELL * column - 3, CELL * row, CELL * column + PITCH * len(code) + 3, CELL * row + CELL - 1),
        fill=jitter(rng, (240, 240, 225), 12),
        outline=(30, 30, 30),
    )
    ink = jitter(rng, COLORS[rng.choice(("black", "blue", "red"))])
    canvas.text(column, row, code, random_font(rng, 17, 20), ink, "plate")
    return canvas, {"code": code}
