"""What a judge's picture holds: a ground, things in the cells of a grid, a crowd, numbers, a time of day."""

import random
from dataclasses import dataclass, replace

COLORS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "white")
SHAPES = ("star", "ring", "square", "cross", "triangle", "disc", "heart", "moon")
TEXTURES = ("plain", "striped", "dotted", "checked")
TIMES = ("day", "dusk", "night")
COLUMNS = "abcdefghijklmnop"

Cell = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Thing:
    """What lies in a cell: a shape, or a plate with a number of two digits (then `shape` is empty)."""

    color: str
    shape: str = ""
    number: str = ""


@dataclass(frozen=True, slots=True)
class World:
    """What is true of one picture.

    Attributes:
        grid: cells a side.
        ground: colour of the background.
        texture: of the background.
        time: brightness of the whole picture.
        things: what lies in which cell (row, column), both from 0.
        crowd: the shape that lies there in numbers, or "".
    """

    grid: int
    ground: str
    texture: str
    time: str
    things: dict[Cell, Thing]
    crowd: str

    @property
    def empty(self) -> list[Cell]:
        """The cells in which only the ground is seen."""
        return [(r, c) for r in range(self.grid) for c in range(self.grid) if (r, c) not in self.things]

    def where(self, shape: str) -> list[Cell]:
        """The cells of a shape."""
        return [cell for cell, thing in self.things.items() if thing.shape == shape]

    @property
    def single(self) -> list[str]:
        """The shapes that lie there once, in the order of `SHAPES`."""
        return [s for s in SHAPES if s != self.crowd and len(self.where(s)) == 1]

    @property
    def numbers(self) -> list[tuple[Cell, Thing]]:
        """The plates, in the order of `COLORS`."""
        found = [(cell, thing) for cell, thing in self.things.items() if thing.number]
        return sorted(found, key=lambda one: COLORS.index(one[1].color))


def draw_world(rng: random.Random, grid: int, ground: str = "") -> World:
    """Draw what a picture holds: mostly empty ones, and crowds in up to half of the cells."""
    ground = ground or rng.choice(COLORS)
    colors = [c for c in COLORS if c != ground]
    shapes = rng.sample(SHAPES, rng.randint(2, 4) + 1)
    area = grid * grid
    size = rng.choice(
        (
            0,
            rng.randint(2, 5),
            rng.randint(2, 5),
            rng.randint(area // 6, area // 5),
            rng.randint(area // 3, area // 2),
        )
    )
    plates = rng.sample(colors, rng.randint(1, 2))
    cells = rng.sample(
        [(r, c) for r in range(grid) for c in range(grid)], size + len(shapes) - 1 + len(plates)
    )
    crowd = shapes.pop() if size else ""
    shapes = shapes[:4]
    things: dict[Cell, Thing] = {}
    crowd_color = rng.choice(colors)
    for _ in range(size):
        things[cells.pop()] = Thing(crowd_color, crowd)
    for shape in shapes:
        if cells:
            things[cells.pop()] = Thing(rng.choice(colors), shape)
    for color in plates:
        if cells:
            things[cells.pop()] = Thing(color, number=f"{rng.randint(10, 99)}")
    return World(grid, ground, rng.choice(TEXTURES), rng.choice(TIMES), things, crowd)


def change_one(rng: random.Random, world: World) -> tuple[World, Cell]:
    """The same picture with another thing in one cell, and that cell."""
    colors = [c for c in COLORS if c != world.ground]
    things = dict(world.things)
    single = [cell for cell, t in things.items() if not t.number and t.shape != world.crowd]
    roll = rng.random()
    spare = [s for s in SHAPES if not world.where(s)]
    if single and roll < 0.4:  # another colour
        cell = rng.choice(single)
        old = things[cell]
        things[cell] = replace(old, color=rng.choice([c for c in colors if c != old.color]))
    elif single and roll < 0.6 and len(single) > 1:  # gone
        cell = rng.choice(single)
        del things[cell]
    else:  # new
        cell = rng.choice(world.empty)
        things[cell] = Thing(rng.choice(colors), rng.choice(spare))
    return replace(world, things=things), cell
