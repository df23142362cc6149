"""A picture that remembers which glyphs and marks were drawn where (the dense labels of training)."""

import random
from dataclasses import dataclass, field

from PIL import Image, ImageDraw, ImageFont

from capsight.reference.drawing.palette import RGB


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
    """A drawing surface of ``width`` x ``height`` px with a record of its contents."""

    rng: random.Random
    width: int
    height: int
    background: RGB = (255, 255, 255)
    glyphs: list[Glyph] = field(default_factory=list)
    marks: list[Mark] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Start with the background, which one time in three is a soft gradient."""
        if self.rng.random() < 0.33:
            low = tuple(max(0, c - self.rng.randint(8, 40)) for c in self.background)
            ramp = Image.linear_gradient("L").rotate(self.rng.choice((0, 90, 180, 270)))
            ramp = ramp.resize((self.width, self.height))
            first = Image.new("RGB", ramp.size, self.background)
            self.image = Image.composite(first, Image.new("RGB", ramp.size, low), ramp)
        else:
            self.image = Image.new("RGB", (self.width, self.height), self.background)
        self.draw = ImageDraw.Draw(self.image)

    def text(self, x: float, y: float, text: str, font: ImageFont.FreeTypeFont, fill: RGB) -> float:
        """Write ``text`` with its left edge at ``x`` and its middle at ``y``; return the right edge."""
        for char in text:
            advance = font.getlength(char)
            if char != " ":
                self.draw.text((x, y), char, font=font, fill=fill, anchor="lm")
                self.glyphs.append(Glyph(char, x + advance / 2, y))
            x += advance + 1
        return x

    @staticmethod
    def text_width(text: str, font: ImageFont.FreeTypeFont) -> float:
        """Width in px that `text` will take."""
        return sum(font.getlength(c) + 1 for c in text)

    def mark(self, shape: str, color: str, x: float, y: float) -> None:
        """Record a shape or bar drawn at (x, y)."""
        self.marks.append(Mark(shape, color, x, y))
