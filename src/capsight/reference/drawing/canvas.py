"""A picture that remembers which glyphs and marks were drawn where (the dense labels of training).

Pages are laid out on a grid of cells of 28 px, the size of a merged vision token: text has two characters to
a cell, a row of text is a row of cells, and the whole page is shifted by a pixel or two.
"""

import random
from dataclasses import dataclass, field

from PIL import Image, ImageDraw, ImageFont

from capsight.reference.drawing.palette import RGB, Face

#: Side of a cell and width of a character, in px.
CELL, PITCH = 28, 14


@dataclass(frozen=True, slots=True)
class Glyph:
    """One character, the pixel position of its centre, and what the text it belongs to is about."""

    char: str
    x: float
    y: float
    about: str


@dataclass(frozen=True, slots=True)
class Word:
    """A word, and the centre of one of the cells that it covers."""

    word: str
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
    words: list[Word] = field(default_factory=list)

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

    def text(
        self,
        column: float,
        row: float,
        text: str,
        font: ImageFont.FreeTypeFont,
        fill: RGB,
        about: str = "",
    ) -> None:
        """Write ``text`` from cell (``column``, ``row``) on, two characters to a cell of 28 px.

        ``about`` is what a question would call the text: the label of a code, the item of a price.
        """
        for k, char in enumerate(text):
            if char == " ":
                continue
            x = CELL * column + PITCH * (k + 0.5) + self.shift[0]
            y = CELL * (row + 0.5) + self.shift[1]
            self.draw.text((x, y), char, font=font, fill=fill, anchor="mm")
            self.glyphs.append(Glyph(char, x, y, about))

    def word(self, column: float, row: float, word: str, face: Face, fill: RGB) -> None:
        """Write a word into two cells from (``column``, ``row``) on, letters as wide as they are."""
        font = face.font()
        while font.getlength(word) > 2 * CELL - 3:
            face = face.smaller()
            font = face.font()
        x, y = CELL * column + 2 + self.shift[0], CELL * (row + 0.5) + self.shift[1]
        self.draw.text((x, y), word, font=font, fill=fill, anchor="lm")
        self.words += [Word(word, CELL * (column + k + 0.5), CELL * (row + 0.5)) for k in (0, 1)]

    def mark(self, shape: str, color: str, x: float, y: float) -> None:
        """Record a shape or bar drawn at (x, y)."""
        self.marks.append(Mark(shape, color, x, y))
