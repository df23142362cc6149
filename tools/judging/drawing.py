"""Pictures of worlds, in the style of a judge: a cell of `CELL` px is one vision token."""

import random
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from judging.world import World

CELL = 28
_LIGHT = {"day": 1.0, "dusk": 0.7, "night": 0.42}

Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Style:
    """How pictures look.

    Attributes:
        palette: colour name -> RGB in [0, 1], the largest channel 1.
        outlined: shapes have a dark rim.
        ruler: shades along the left and the upper edge tell row and column.
        lines: dark lines between the cells.
        gradient: the ground gets darker from left to right by up to this share.
        noise: standard deviation of the noise of a pixel.
        sizes: side of a shape in px.
        period: period of the textures in px.
        wash: share of white in the ground.
        blotches: amplitude of slow changes of the brightness, as on paper.
        levels: levels of a channel, reached by ordered dithering; 0: all.
        shift: shapes lie up to so many px beside the middle of their cell.
    """

    palette: dict[str, tuple[float, float, float]]
    outlined: bool
    ruler: bool
    lines: bool
    gradient: float
    noise: float
    sizes: tuple[int, ...]
    period: int
    wash: float = 0.0
    blotches: float = 0.0
    levels: int = 0
    shift: int = 0


MOSAIC = Style(
    {
        "red": (1, 0.12, 0.12), "orange": (1, 0.55, 0.1), "yellow": (1, 0.95, 0.2), "green": (0.15, 1, 0.25),
        "cyan": (0.1, 0.95, 1), "blue": (0.15, 0.3, 1), "purple": (0.7, 0.2, 1), "white": (1, 1, 1),
    },
    outlined=False, ruler=True, lines=False, gradient=0.0, noise=0.02, sizes=(18, 20, 22), period=7,
)  # fmt: skip
TILES = Style(
    {
        "red": (1, 0.3, 0.35), "orange": (1, 0.62, 0.3), "yellow": (1, 0.9, 0.45), "green": (0.4, 1, 0.4),
        "cyan": (0.35, 1, 0.95), "blue": (0.35, 0.5, 1), "purple": (0.85, 0.4, 1), "white": (1, 0.98, 0.95),
    },
    outlined=True, ruler=False, lines=True, gradient=0.15, noise=0.03, sizes=(20, 22, 24), period=14,
)  # fmt: skip
PAPER = Style(
    {
        "red": (1, 0.18, 0.22), "orange": (1, 0.5, 0.12), "yellow": (1, 0.86, 0.1), "green": (0.42, 1, 0.15),
        "cyan": (0.15, 1, 0.85), "blue": (0.22, 0.4, 1), "purple": (0.88, 0.25, 1), "white": (1, 0.97, 0.9),
    },
    outlined=True, ruler=False, lines=False, gradient=0.0, noise=0.03, sizes=(17, 19, 21), period=14,
    wash=0.3, blotches=0.06, levels=7, shift=2,
)  # fmt: skip
_BAYER = np.array([[0, 8, 2, 10], [12, 4, 14, 6], [3, 11, 1, 9], [15, 7, 13, 5]], np.float32) / 16


@cache
def _shape(shape: str, size: int) -> Floats:
    """A shape's coverage of a cell, [CELL, CELL] in [0, 1]."""
    scale = 8
    side, s = CELL * scale, size * scale
    image = Image.new("L", (side, side))
    draw = ImageDraw.Draw(image)
    a, b, m = (side - s) / 2, (side + s) / 2, side / 2
    if shape == "star":
        turns = np.arange(10) * np.pi / 5 - np.pi / 2
        reach = np.where(np.arange(10) % 2, 0.2 * s, 0.52 * s)
        draw.polygon(
            [(m + r * np.cos(t), m + r * np.sin(t)) for r, t in zip(reach, turns, strict=True)], fill=255
        )
    elif shape == "ring":
        draw.ellipse((a, a, b, b), outline=255, width=int(0.22 * s))
    elif shape == "square":
        draw.rectangle((a, a, b, b), fill=255)
    elif shape == "cross":
        w = 0.15 * s
        draw.rectangle((m - w, a, m + w, b), fill=255)
        draw.rectangle((a, m - w, b, m + w), fill=255)
    elif shape == "triangle":
        draw.polygon([(m, a), (b, b), (a, b)], fill=255)
    elif shape == "disc":
        draw.ellipse((a, a, b, b), fill=255)
    elif shape == "heart":
        draw.ellipse((a, a, m, m), fill=255)
        draw.ellipse((m, a, b, m), fill=255)
        draw.polygon([(a, a + 0.3 * s), (b, a + 0.3 * s), (m, b)], fill=255)
    elif shape == "moon":
        draw.ellipse((a, a, b, b), fill=255)
        draw.ellipse((a + 0.35 * s, a - 0.05 * s, b + 0.3 * s, b - 0.1 * s), fill=0)
    return np.asarray(image.resize((CELL, CELL), Image.Resampling.BOX), np.float32) / 255


@cache
def _digit(digit: str) -> Floats:
    """A digit's coverage of half a cell, [CELL, CELL // 2] in [0, 1]."""
    image = Image.new("L", (CELL // 2, CELL))
    font = ImageFont.load_default(20)
    ImageDraw.Draw(image).text((CELL / 4, CELL / 2), digit, fill=255, font=font, anchor="mm")
    return np.asarray(image, np.float32) / 255


@cache
def _texture(name: str, side: int, period: int) -> Floats:
    """Where the ground is darker, [side, side] in [0, 1]."""
    y, x = np.mgrid[:side, :side].astype(np.float32)
    if name == "striped":
        return ((x + y) % period < period / 2).astype(np.float32)
    if name == "dotted":
        h = (period - 1) / 2
        return (((x % period - h) ** 2 + (y % period - h) ** 2) < (0.3 * period) ** 2).astype(np.float32)
    if name == "checked":
        return ((x // (period // 2 + 1) + y // (period // 2 + 1)) % 2).astype(np.float32)
    return np.zeros((side, side), np.float32)


def draw(world: World, style: Style, rng: random.Random) -> Image.Image:
    """The picture of a world, RGB, `grid * CELL` px a side."""
    side = world.grid * CELL
    canvas = np.empty((side, side, 3), np.float32)
    canvas[:] = np.array(style.palette[world.ground]) * (1 - style.wash) + style.wash
    canvas *= (1 - 0.3 * _texture(world.texture, side, style.period))[:, :, None]
    if style.gradient:
        slope = np.linspace(1, 1 - style.gradient * rng.random(), side, dtype=np.float32)
        canvas *= slope[None, :, None]
    if style.lines:
        canvas[::CELL] *= 0.5
        canvas[:, ::CELL] *= 0.5
    for (row, column), thing in world.things.items():
        cell = canvas[row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL]
        color = np.array(style.palette[thing.color], np.float32)
        if thing.number:
            cell[3:-3, 1:-1] = color
            ink = np.concatenate([_digit(d) for d in thing.number], 1)[:, :, None]
            cell *= 1 - ink
            continue
        size = rng.choice(style.sizes)
        by = tuple(rng.randint(-style.shift, style.shift) for _ in range(2)) if style.shift else (0, 0)
        if style.outlined:
            rim = np.roll(_shape(thing.shape, size + 3), by, (0, 1))[:, :, None]
            cell *= 1 - 0.9 * rim
        covered = np.roll(_shape(thing.shape, size - 2 * style.outlined), by, (0, 1))[:, :, None]
        cell *= 1 - covered
        cell += covered * color
    canvas *= _LIGHT[world.time] * rng.uniform(0.95, 1.05)
    if style.ruler:
        shades = np.repeat(np.linspace(0, 1, world.grid, dtype=np.float32), CELL)
        canvas[:, :4] = shades[:, None, None]
        canvas[:4] = shades[None, :, None]
        canvas[:4, :4] = 0.5
    noise = np.random.default_rng(rng.getrandbits(32)).standard_normal((side, side), np.float32)
    canvas += style.noise * noise[:, :, None]
    if style.blotches:
        coarse = Image.fromarray(
            np.array([[rng.uniform(-1, 1) for _ in range(5)] for _ in range(5)], np.float32)
        )
        slow = np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC))
        canvas *= 1 + style.blotches * slow[:, :, None]
    if style.levels:
        steps = style.levels - 1
        canvas = np.floor(canvas * steps + np.tile(_BAYER, (side // 4, side // 4))[:, :, None]) / steps
    return Image.fromarray((canvas.clip(0, 1) * 255).astype(np.uint8))
