"""Dense supervision of the vision tower: which character, shape and colour is where.

Every merged vision token covers a cell of 28 x 28 px. It is asked for the character in its left and in its
right half, and for the shape and the colour of a mark whose centre lies in it.
"""

import random
import string
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from capsight.reference.drawing import Canvas, Scene
from capsight.reference.drawing.canvas import CELL, PITCH
from capsight.reference.drawing.palette import CODE_ALPHABET, COLORS, jitter, light, random_font
from capsight.reference.drawing.shapes import SHAPES

SLOTS = 2
CHARACTERS = string.ascii_lowercase + string.ascii_uppercase + string.digits + "."
_CHAR_CLASS = {c: i + 1 for i, c in enumerate(CHARACTERS)}
_SHAPE_CLASS = {s: i + 1 for i, s in enumerate((*SHAPES, "bar"))}
_COLOR_CLASS = {c: i + 1 for i, c in enumerate(COLORS)}


@dataclass(frozen=True, slots=True)
class DenseLabels:
    """Labels of ``n`` merged tokens, row by row: chars [n, 2], shapes [n], colors [n]; 0 is nothing."""

    chars: Tensor
    shapes: Tensor
    colors: Tensor

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """All tensors, in the order of the fields."""
        return self.chars, self.shapes, self.colors


def dense_labels(scenes: list[Scene]) -> DenseLabels:
    """Labels of all merged tokens of the scenes, one scene after the other."""
    chars, shapes, colors = [], [], []
    for scene in scenes:
        columns, rows = scene.image.width // CELL, scene.image.height // CELL
        c = torch.zeros(rows * columns, SLOTS, dtype=torch.long)
        s, k = torch.zeros(rows * columns, dtype=torch.long), torch.zeros(rows * columns, dtype=torch.long)
        for glyph in scene.glyphs:
            cell = int(glyph.y // CELL) * columns + int(glyph.x // CELL)
            c[cell, int(glyph.x % CELL // PITCH)] = _CHAR_CLASS[glyph.char]
        for mark in scene.marks:
            cell = min(rows - 1, int(mark.y // CELL)) * columns + min(columns - 1, int(mark.x // CELL))
            s[cell], k[cell] = _SHAPE_CLASS[mark.shape], _COLOR_CLASS[mark.color]
        chars.append(c)
        shapes.append(s)
        colors.append(k)
    return DenseLabels(torch.cat(chars), torch.cat(shapes), torch.cat(colors))


def text_page(rng: random.Random, width: int = 224, height: int = 224) -> Scene:
    """A page full of random characters: the densest lesson in reading."""
    canvas = Canvas(rng, width, height, light(rng, 205))
    inks = ((40, 40, 40), *(COLORS[c] for c in ("blue", "red", "purple", "green")))
    for row in range(canvas.rows):
        font, ink = random_font(rng, 12, 20), jitter(rng, rng.choice(inks), 30)
        alphabet = string.ascii_lowercase if rng.random() < 0.3 else CODE_ALPHABET + "01."
        line = (rng.choice(alphabet if rng.random() < 0.9 else " ") for _ in range(2 * canvas.columns))
        canvas.text(0, row, "".join(line), font, ink)
    return Scene("text", canvas.image, {}, tuple(canvas.glyphs), ())


class DenseHeads(nn.Module):
    """Throw-away linear heads over merged vision tokens [n, width]."""

    def __init__(self, width: int) -> None:
        """Make three heads: characters, shapes, colours."""
        super().__init__()
        self.chars = nn.Linear(width, SLOTS * (len(_CHAR_CLASS) + 1))
        self.shapes = nn.Linear(width, len(_SHAPE_CLASS) + 1)
        self.colors = nn.Linear(width, len(_COLOR_CLASS) + 1)

    def forward(self, features: Tensor, labels: DenseLabels) -> tuple[Tensor, dict[str, float]]:
        """Return the summed loss and the accuracy on occupied slots and cells."""
        chars = self.chars(features).view(-1, len(_CHAR_CLASS) + 1)
        char_labels = labels.chars.view(-1)
        shapes, colors = self.shapes(features), self.colors(features)
        loss = _loss(chars, char_labels) + 0.4 * (_loss(shapes, labels.shapes) + _loss(colors, labels.colors))

        def right(logits: Tensor, target: Tensor) -> float:
            there = target > 0
            return (logits.argmax(-1)[there] == target[there]).float().mean().item()

        accuracy = {
            "chars": right(chars, char_labels),
            "shapes": right(shapes, labels.shapes),
            "colors": right(colors, labels.colors),
        }
        return loss, accuracy


def _loss(logits: Tensor, target: Tensor) -> Tensor:
    """Cross entropy in float32 in which an empty place counts little."""
    weight = torch.ones(logits.shape[-1], device=logits.device)
    weight[0] = 0.15
    return nn.functional.cross_entropy(logits.float(), target, weight)
