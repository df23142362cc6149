"""Pictures of 64 x 64 px with what is true of them, and the word each of their 8 x 8 tokens stands for."""

import random
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from capsight.reference.drawing.palette import FONTS, load_font
from judging.smol.words import COLORS, ICONS, PAPERS, PHOTOS, SORTS, WORDS

SIZE, GRID = 64, 8
CELL = SIZE // GRID
#: The training pictures, and the shares of the held-out ones: one picture is in one split only.
SPLITS = ("train", "calibration", "dev", "test")


@dataclass(frozen=True, slots=True)
class Picture:
    """One picture.

    Attributes:
        image: [64, 64, 3] uint8.
        sort: photo, icon, shape or page.
        name: what it shows, or the word written on it.
        color: of the shape or of the paper; "" for others.
        number: two digits on a page; "" for others.
        labels: [8, 8] the word of each token.
    """

    image: np.ndarray
    sort: str
    name: str
    color: str = ""
    number: str = ""
    labels: np.ndarray = field(default_factory=lambda: np.empty(0))

    @property
    def pil(self) -> Image.Image:
        """The picture for a processor."""
        return Image.fromarray(self.image)


@lru_cache(maxsize=4)
def _arrays(path: Path) -> dict[str, Any]:
    with np.load(path) as file:
        return {k: file[k] for k in file.files}


class Pictures:
    """Draws pictures of a split from the arrays that `registry.fetch` made."""

    def __init__(self, folder: Path, split: str) -> None:
        """Load the arrays; held-out splits take every third picture of the packages' test pictures."""
        photos, shapes = _arrays(folder / "photos.npz"), _arrays(folder / "shapes.npz")
        part, first, step = "train", 0, 1
        if split != "train":
            part, first, step = "test", SPLITS.index(split) - 1, 3
        self.photos = photos[f"{part}_image"][first::step], photos[f"{part}_label"][first::step]
        chosen = slice(first, None, step)
        known = np.isin(shapes[f"{part}_color"][chosen], list(COLORS))
        self.shapes = tuple(shapes[f"{part}_{k}"][chosen][known] for k in ("image", "shape", "color"))
        self.icons = _arrays(folder / "icons.npz")
        self.train = split == "train"

    def draw(self, rng: random.Random, sort: str = "", name: str = "") -> Picture:
        """A picture, of a sort, of a thing of that name (photographs and icons only)."""
        sort = sort or rng.choices(SORTS, (3, 2, 1, 2))[0]
        picture: Picture = getattr(self, f"_{sort}")(rng, name)
        return picture

    def _photo(self, rng: random.Random, name: str) -> Picture:
        images, labels = self.photos
        while True:
            i = rng.randrange(len(images))
            if not name or PHOTOS[labels[i]] == name:
                break
        image = np.asarray(Image.fromarray(images[i]).resize((SIZE, SIZE), Image.Resampling.BILINEAR))
        if self.train:
            image = image[:, ::-1] if rng.random() < 0.5 else image
            image = np.roll(image, (rng.randint(-6, 6), rng.randint(-6, 6)), (0, 1))
        name = PHOTOS[labels[i]]
        return Picture(image, "photo", name, labels=_labels("photo", name))

    def _icon(self, rng: random.Random, name: str) -> Picture:
        name = name or rng.choice(ICONS)
        size = rng.randint(40, 64)
        icon = Image.fromarray(self.icons[name]).resize((size, size)).rotate(rng.randint(-15, 15))
        page = Image.new("RGB", (SIZE, SIZE), tuple(rng.randint(150, 255) for _ in range(3)))
        page.paste(icon, (rng.randint(0, SIZE - size), rng.randint(0, SIZE - size)), icon)
        return Picture(np.asarray(page), "icon", name, labels=_labels("icon", name))

    def _shape(self, rng: random.Random, name: str) -> Picture:
        images, names, colors = self.shapes
        i = rng.randrange(len(images))
        name, color = str(names[i]), str(colors[i])
        labels = _labels("shape", name)
        labels[1:, ::2] = color
        return Picture(images[i], "shape", name, color, labels=labels)

    def _page(self, rng: random.Random, name: str) -> Picture:
        name, color, number = name or rng.choice(WORDS), rng.choice(PAPERS), f"{rng.randint(10, 99)}"
        paper = tuple(max(0, min(255, v + rng.randint(-12, 12))) for v in COLORS[color])
        page = Image.new("RGB", (SIZE, SIZE), paper)
        draw = ImageDraw.Draw(page)
        labels = _labels("page", color)
        ink = tuple(rng.randint(0, 60) for _ in range(3))
        boxes = [
            _write(draw, rng, name, (13, 17), (2, 18), ink),
            _write(draw, rng, number, (20, 26), (31, 36), ink),
        ]
        _mark(labels, boxes[0], name)
        left, top, right, bottom = boxes[1]
        middle = (left + right) // 2
        _mark(labels, (left, top, middle, bottom), number[0])
        _mark(labels, (middle, top, right, bottom), number[1])
        return Picture(np.asarray(page), "page", name, color, number, labels)


def _labels(sort: str, name: str) -> np.ndarray:
    labels = np.full((GRID, GRID), name, dtype="<U16")
    labels[0] = sort
    return labels


Box = tuple[int, int, int, int]


def _write(
    draw: ImageDraw.ImageDraw,
    rng: random.Random,
    text: str,
    sizes: tuple[int, int],
    rows: tuple[int, int],
    ink: tuple[int, ...],
) -> Box:
    """Write text somewhere in a range of rows, as large as fits; where it stands in px."""
    font_name = rng.choice(list(FONTS))
    for size in range(rng.randint(*sizes), 7, -1):
        font = load_font(font_name, size)
        left, top, right, bottom = (int(v) for v in draw.textbbox((0, 0), text, font=font))
        if right - left <= SIZE - 4:
            break
    x, y = rng.randint(1, SIZE - 2 - (right - left)), rng.randint(*rows)
    draw.text((x - left, y - top), text, font=font, fill=ink)
    return x, y, x + right - left, y + bottom - top


def _mark(labels: np.ndarray, box: Box, word: str) -> None:
    """Label the tokens whose centre column lies in a box, and at least the one at its middle."""
    left, top, right, bottom = box
    row = slice(max(1, top // CELL), min(GRID, (bottom - 1) // CELL + 1))
    first = (left + CELL // 2) // CELL
    labels[row, first : max(first + 1, (right + CELL // 2) // CELL)] = word
