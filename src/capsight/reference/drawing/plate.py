"""A name plate with a code, in front of a cluttered background."""

import random
from typing import Any

from PIL import Image

from capsight.reference.drawing.canvas import CELL, PITCH, Canvas
from capsight.reference.drawing.palette import COLORS, jitter, light, random_code, random_font


def paint(rng: random.Random, width: int, height: int) -> tuple[Canvas, dict[str, Any]]:
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
