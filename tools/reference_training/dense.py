"""Dense supervision of the vision tower: which character, shape and colour is where.

Every merged vision token covers a cell of 28 x 28 px. It is asked for the character in its left and in its
right half, for the shape and the colour of a mark whose centre lies in it, and for its word: the word written
there, or what the text there is about (the label of a code, the item of a price, the bar of a value, the row
and column of a number).
"""

import random
import string
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from capsight.reference.drawing import Canvas, Scene
from capsight.reference.drawing.canvas import CELL, PITCH
from capsight.reference.drawing.figures import SHAPES
from capsight.reference.drawing.palette import (
    CODE_ALPHABET,
    COLORS,
    ITEMS,
    LABELS,
    jitter,
    light,
    random_font,
)

SLOTS = 2
CHARACTERS = string.ascii_uppercase + string.digits + "."
_CHAR_CLASS = {c: i + 1 for i, c in enumerate(CHARACTERS)}
_ABOUTS = (
    *LABELS, *ITEMS, *COLORS, "total", "small print", "plate",
    *(f"{row}{column}" for row in "ABCD" for column in range(1, 5)),
)  # fmt: skip
_ABOUT_CLASS = {a: i + 1 for i, a in enumerate(_ABOUTS)}
_SHAPE_CLASS = {s: i + 1 for i, s in enumerate((*SHAPES, "bar"))}
_COLOR_CLASS = {c: i + 1 for i, c in enumerate(COLORS)}


@dataclass(frozen=True, slots=True)
class DenseLabels:
    """Labels of ``n`` merged tokens, row by row: chars [n, 2], shapes, colors, abouts [n]; 0 is nothing."""

    chars: Tensor
    shapes: Tensor
    colors: Tensor
    abouts: Tensor

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """All tensors, in the order of the fields."""
        return self.chars, self.shapes, self.colors, self.abouts


def dense_labels(scenes: list[Scene]) -> DenseLabels:
    """Labels of all merged tokens of the scenes, one scene after the other."""
    chars, shapes, colors, abouts = [], [], [], []
    for scene in scenes:
        columns, rows = scene.image.width // CELL, scene.image.height // CELL
        c = torch.zeros(rows * columns, SLOTS, dtype=torch.long)
        s, k, a = (torch.zeros(rows * columns, dtype=torch.long) for _ in range(3))
        for glyph in scene.glyphs:
            cell = int(glyph.y // CELL) * columns + int(glyph.x // CELL)
            c[cell, int(glyph.x % CELL // PITCH)] = _CHAR_CLASS[glyph.char]
            if glyph.about:
                a[cell] = _ABOUT_CLASS[glyph.about]
        for word in scene.words:
            a[int(word.y // CELL) * columns + int(word.x // CELL)] = _ABOUT_CLASS[word.word]
        for mark in scene.marks:
            cell = min(rows - 1, int(mark.y // CELL)) * columns + min(columns - 1, int(mark.x // CELL))
            s[cell], k[cell] = _SHAPE_CLASS[mark.shape], _COLOR_CLASS[mark.color]
        chars.append(c)
        shapes.append(s)
        colors.append(k)
        abouts.append(a)
    return DenseLabels(*(torch.cat(x) for x in (chars, shapes, colors, abouts)))


def text_page(rng: random.Random, width: int = 224, height: int = 224) -> Scene:
    """A page full of random characters: the densest lesson in reading."""
    canvas = Canvas(rng, width, height, light(rng, 205))
    inks = ((40, 40, 40), *(COLORS[c] for c in ("blue", "red", "purple", "green")))
    for row in range(canvas.rows):
        font, ink = random_font(rng, 12, 20), jitter(rng, rng.choice(inks), 30)
        line = (
            rng.choice(CODE_ALPHABET + "01B." if rng.random() < 0.9 else " ")
            for _ in range(2 * canvas.columns)
        )
        canvas.text(0, row, "".join(line), font, ink)
    return Scene("text", canvas.image, {}, tuple(canvas.glyphs), ())


class DenseHeads(nn.Module):
    """Throw-away linear heads over merged vision tokens [n, width]."""

    def __init__(self, width: int) -> None:
        """Make four heads: characters, shapes, colours, what text is about."""
        super().__init__()
        self.chars = nn.Linear(width, SLOTS * (len(_CHAR_CLASS) + 1))
        self.shapes = nn.Linear(width, len(_SHAPE_CLASS) + 1)
        self.colors = nn.Linear(width, len(_COLOR_CLASS) + 1)
        self.abouts = nn.Linear(width, len(_ABOUT_CLASS) + 1)

    def forward(self, features: Tensor, labels: DenseLabels) -> tuple[Tensor, dict[str, float]]:
        """Return the summed loss and the accuracy on occupied slots and cells."""
        chars = self.chars(features).view(-1, len(_CHAR_CLASS) + 1)
        char_labels = labels.chars.view(-1)
        shapes, colors, abouts = self.shapes(features), self.colors(features), self.abouts(features)
        marks = _loss(shapes, labels.shapes) + _loss(colors, labels.colors)
        loss = _loss(chars, char_labels) + 0.4 * marks + 0.5 * _loss(abouts, labels.abouts)

        def right(logits: Tensor, target: Tensor) -> float:
            there = target > 0
            return (logits.argmax(-1)[there] == target[there]).float().mean().item()

        accuracy = {
            "chars": right(chars, char_labels),
            "shapes": right(shapes, labels.shapes),
            "colors": right(colors, labels.colors),
            "abouts": right(abouts, labels.abouts),
        }
        return loss, accuracy


def _loss(logits: Tensor, target: Tensor) -> Tensor:
    """Cross entropy in float32 in which an empty place counts little."""
    weight = torch.ones(logits.shape[-1], device=logits.device)
    weight[0] = 0.15
    return nn.functional.cross_entropy(logits.float(), target, weight)
