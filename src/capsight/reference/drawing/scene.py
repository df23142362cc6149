"""A scene: one image, what is true of it, and where its glyphs and marks lie."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from PIL import Image

from capsight.reference.drawing import figures, papers
from capsight.reference.drawing.canvas import CELL, Canvas, Glyph, Mark, Word

_PAINTERS: dict[str, Callable[[random.Random, int, int], tuple[Canvas, dict[str, Any]]]] = {
    "card": papers.card,
    "receipt": papers.receipt,
    "table": papers.table,
    "chart": figures.chart,
    "shapes": figures.shapes,
    "plate": papers.plate,
}

#: The kinds of image, in a fixed order.
KINDS: tuple[str, ...] = tuple(_PAINTERS)

SMALL = (224, 224)
_LARGE_SIZES: dict[str, tuple[tuple[int, int], ...]] = {
    "card": ((448, 224), (224, 448)),
    "receipt": ((224, 448),),
    "table": ((448, 224), (224, 448)),
    "chart": ((448, 224),),
    "shapes": ((448, 224), (224, 448)),
    "plate": ((448, 224), (224, 448)),
}


@dataclass(frozen=True, slots=True)
class Scene:
    """One drawn image.

    Attributes:
        kind: one of `KINDS`.
        image: RGB, sides multiples of 28 px (one merged vision token covers 28 x 28 px).
        facts: what is true of the image; the questions are made from it.
        glyphs: every character drawn, with its centre.
        marks: every shape and bar drawn.
        words: every word drawn, once for each cell that it covers.
    """

    kind: str
    image: Image.Image
    facts: dict[str, Any]
    glyphs: tuple[Glyph, ...]
    marks: tuple[Mark, ...]
    words: tuple[Word, ...] = ()


#: Pages with room for little, in cells: the first pages of training.
_LITTLE_SIZES: dict[str, tuple[tuple[int, int], ...]] = {
    "card": ((6, 3), (7, 4)),
    "receipt": ((6, 2), (6, 3)),
    "table": ((2, 2), (3, 2), (3, 3)),
    "chart": ((4, 3), (6, 4)),
    "shapes": ((2, 2), (3, 2)),
    "plate": ((3, 2), (4, 2)),
}


def draw_scene(rng: random.Random, kind: str | None = None, large: float = 0.5, little: float = 0.0) -> Scene:
    """Draw one scene.

    Args:
        rng: the only source of randomness.
        kind: one of `KINDS`; drawn at random when None.
        large: probability of a page of 128 vision tokens (448 x 224 or 224 x 448 px) instead of
            64 (224 x 224 px). A larger page holds no more content: it has wider blank margins.
        little: probability of a page of 4 to 32 vision tokens with less content.
    """
    kind = kind or rng.choice(KINDS)
    if little and rng.random() < little:
        columns, rows = rng.choice(_LITTLE_SIZES[kind])
        width, height = CELL * columns, CELL * rows
    else:
        width, height = rng.choice(_LARGE_SIZES[kind]) if rng.random() < large else SMALL
    canvas, facts = _PAINTERS[kind](rng, width, height)
    return Scene(kind, canvas.image, facts, tuple(canvas.glyphs), tuple(canvas.marks), tuple(canvas.words))
