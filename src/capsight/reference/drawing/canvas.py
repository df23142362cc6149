"""A picture that remembers which glyphs and marks were drawn where (the dense labels of training).

Pages are laid out on a grid of cells of 28 px, the size of a merged vision token: text has two characters to
a cell, a row of text is a row of cells, and the whole page is shifted by a pixel or two.
"""

import random
from dataclasses import dataclass, field

from PIL import Image, ImageDraw, ImageFont

from capsight.reference.drawing.palette import RGB

#: Side of a cell and width of a character, in px.
CELL, PITCH = 28, 14


@dataclass(frozen=True, slots=True)
class Glyph:
    """One character and the pixel position of its centre."""

    char: str
    x: float
    y: float


@dataclass(frozen=True, slots=True)
class Mark:
    """One shape or bar, its colour, and the pixel position that stands for it."""

    shape: str
    color: str
    x: float
    y: float


@dataclass
class Canvas:
    """A drawing surface of ``width`` x ``height`` px with a record of its contents.

    `columns` and `rows` are its size in cells.
    """

    rng: random.Random
    width: int
    height: int
    background: RGB = (255, 255, 255)
    glyphs: list[Glyph] = field(default_factory=list)
    marks: list[Mark] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Start with the background, which one time in three is a soft gradient."""
        self.shift = (self.rng.uniform(-2, 2), self.rng.uniform(-3, 3))
        if self.rng.random() < 0.33:
            low = tuple(max(0, c - self.rng.randint(8, 40)) for c in self.background)
            ramp = Image.linear_gradient("L").rotate(self.rng.choice((0, 90, 180, 270)))
            ramp = ramp.resize((self.width, self.height))
            first = Image.new("RGB", ramp.size, self.background)
            self.image = Image.composite(first, Image.new("RGB", ramp.size, low), ramp)
        else:
            self.image = Image.new("RGB", (self.width, self.height), self.background)
        self.draw = ImageDraw.Draw(self.image)

    @property
    def columns(self) -> int:
        """Cells in a row."""
        return self.width // CELL

    @property
    def rows(self) -> int:
        """Rows of cells."""
        return self.height // CELL

    def text(self, column: float, row: float, text: str, font: ImageFont.FreeTypeFont, fill: RGB) -> None:
        """Write ``text`` from cell (``column``, ``row``) on, two characters to a cell of 28 px."""
        for k, char in enumerate(text):
            if char == " ":
                continue
            x = CELL * column + PITCH * (k + 0.5) + self.shift[0]
            y = CELL * (row + 0.5) + self.shift[1]
            self.draw.text((x, y), char, font=font, fill=fill, anchor="mm")
            self.glyphs.append(Glyph(char, x, y))

    def mark(self, shape: str, color: str, x: float, y: float) -> None:
        """Record a shape or bar drawn at (x, y)."""
        self.marks.append(Mark(shape, color, x, y))
