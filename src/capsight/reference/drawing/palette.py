"""Colours, fonts and words that the scenes draw with."""

import random
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from PIL import ImageFont

RGB = tuple[int, int, int]

COLORS: dict[str, RGB] = {
    "red": (214, 40, 40),
    "green": (44, 160, 60),
    "blue": (40, 80, 214),
    "yellow": (240, 205, 40),
    "purple": (140, 50, 170),
    "orange": (245, 135, 25),
    "cyan": (40, 190, 205),
    "black": (25, 25, 25),
}

#: Fonts that matplotlib ships, so that every machine draws the same glyphs: name -> smallest size in px.
FONTS: dict[str, int] = {
    "DejaVuSans": 12,
    "DejaVuSans-Bold": 12,
    "DejaVuSansMono": 12,
    "DejaVuSerif": 12,
    "STIXGeneral": 14,
    "STIXGeneralBol": 14,
}

#: Characters of codes, without those that are hard to tell apart in some font or wider than others.
CODE_ALPHABET = "ACDEFHJKLNPRTUVXY23456789"

LABELS = ("gate", "seat", "room", "desk", "train", "flight", "locker", "order", "ticket", "shelf")
ITEMS = (
    "milk", "bread", "tea", "rice", "soap", "apples", "cheese",
    "juice", "eggs", "salt", "honey", "pasta", "coffee", "sugar",
)  # fmt: skip


@lru_cache(maxsize=256)
def load_font(name: str, size: int) -> ImageFont.FreeTypeFont:
    """Return a font that matplotlib ships, at ``size`` pixels."""
    import matplotlib  # only pictures need it

    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{name}.ttf"
    return ImageFont.truetype(str(path), size, layout_engine=ImageFont.Layout.BASIC)


@dataclass(frozen=True, slots=True)
class Face:
    """A font at a size in px."""

    name: str
    size: int

    def font(self) -> ImageFont.FreeTypeFont:
        """The font itself."""
        return load_font(self.name, self.size)

    def smaller(self) -> "Face":
        """The same font, one px smaller."""
        return Face(self.name, self.size - 1)


def random_face(rng: random.Random, low: int, high: int) -> Face:
    """Draw a font and a size in ``[low, high]`` px, never below the font's smallest legible size."""
    name = rng.choice(list(FONTS))
    smallest = max(low, FONTS[name])
    return Face(name, rng.randint(smallest, max(smallest, high)))


def random_font(rng: random.Random, low: int, high: int) -> ImageFont.FreeTypeFont:
    """The font of a `random_face`."""
    return random_face(rng, low, high).font()


def jitter(rng: random.Random, color: RGB, amount: int = 14) -> RGB:
    """Vary a colour a little, so that no two reds are the same bytes."""
    return tuple(min(255, max(0, c + rng.randint(-amount, amount))) for c in color)  # type: ignore[return-value]


def light(rng: random.Random, low: int, high: int = 255) -> RGB:
    """A background whose channels lie in ``[low, high]``."""
    return rng.randint(low, high), rng.randint(low, high), rng.randint(low, high)


def random_code(rng: random.Random, low: int = 4, high: int = 6) -> str:
    """A code of ``low`` to ``high`` characters."""
    return "".join(rng.choice(CODE_ALPHABET) for _ in range(rng.randint(low, high)))
