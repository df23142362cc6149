"""Questions about everything that pictures hold, their only right answers, and where these are to be seen."""

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from judging.world import COLORS, COLUMNS, SHAPES, TEXTURES, TIMES, Cell, World

#: (picture, cell number) of a prompt; cell -1 stands for the prompt's first token.
Place = tuple[int, int]
START: Place = (0, -1)
#: How many times what is counted a counting head looks at the first token.
REST = 4


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of an answer, and where two attention heads may look for it while they learn."""

    text: str
    look: tuple[Place, ...]
    other: tuple[Place, ...]


@dataclass(frozen=True, slots=True)
class Question:
    """A question, its answer, and the kind it belongs to (called task as in the reference task)."""

    task: str
    text: str
    answer: str
    pieces: tuple[Piece, ...] = ()


def _piece(text: str, look: list[Place], other: list[Place] | None = None) -> Piece:
    return Piece(text, tuple(look), tuple(look if other is None else other))


def _question(task: str, text: str, *pieces: Piece) -> Question:
    return Question(task, text, "".join(p.text for p in pieces), pieces)


def name_of(cell: Cell) -> str:
    """How a cell is called: its column's letter and its row from 1."""
    return f"{COLUMNS[cell[1]]}{cell[0] + 1}"


def places(k: int, world: World, cells: list[Cell]) -> list[Place]:
    """Places of cells of picture `k`."""
    return [(k, r * world.grid + c) for r, c in cells]


def _amount(world: World, shape: str) -> str:
    n = len(world.where(shape))
    return str(n) if n < 6 else "some" if n < world.grid**2 // 4 else "many"


def _ground(w: World, k: int, rng: random.Random) -> Question:
    return _question("ground", "what color is the ground?", _piece(w.ground, places(k, w, w.empty)))


def _texture(w: World, k: int, rng: random.Random) -> Question:
    return _question("texture", "what is the texture?", _piece(w.texture, places(k, w, w.empty)))


def _time(w: World, k: int, rng: random.Random) -> Question:
    return _question("time", "what time is it?", _piece(w.time, places(k, w, w.empty)))


def _empty(w: World, k: int, rng: random.Random) -> Question | None:
    occupied = len(w.things)
    if w.grid**2 / 4 < occupied < w.grid**2 / 3:
        return None
    everywhere = [(k, i) for i in range(w.grid**2)]
    return _question(
        "empty", "is it mostly empty?", _piece("no" if occupied > w.grid**2 / 4 else "yes", everywhere)
    )


def _common(w: World, k: int, rng: random.Random) -> Question | None:
    if not w.crowd:
        return None
    cells = w.where(w.crowd)
    seen = places(k, w, cells)
    color = w.things[cells[0]].color
    return _question("common", "what is most common?", _piece(color, seen), _piece(f" {w.crowd}", seen))


def _count(w: World, k: int, rng: random.Random) -> Question:
    shape = w.crowd if w.crowd and rng.random() < 0.65 else rng.choice(SHAPES)
    seen = places(k, w, w.where(shape))
    piece = _piece(_amount(w, shape), [*seen, *[START] * REST], seen or [START])
    return _question("count", f"how many {shape}s?", piece)


def _at(w: World, k: int, rng: random.Random) -> Question:
    single = [c for c, t in w.things.items() if t.shape != w.crowd]
    cell = rng.choice(single if rng.random() < 0.6 else w.empty if rng.random() < 0.5 else list(w.things))
    seen = places(k, w, [cell])
    text = f"what is at {name_of(cell)}?"
    thing = w.things.get(cell)
    if thing is None:
        return _question("at", text, _piece("nothing", seen))
    if thing.number:
        return _question("at", text, _piece(thing.number, seen))
    return _question("at", text, _piece(thing.color, seen), _piece(f" {thing.shape}", seen))


def _where(w: World, k: int, rng: random.Random) -> Question | None:
    if not w.single:
        return None
    shape = rng.choice(w.single)
    cell = w.where(shape)[0]
    return _question("where", f"where is the {shape}?", _piece(name_of(cell), places(k, w, [cell])))


def _present(w: World, k: int, rng: random.Random) -> Question:
    there = [s for s in SHAPES if w.where(s)]
    missing = [s for s in SHAPES if s not in there]
    yes = rng.random() < 0.5
    shape = rng.choice(there if yes else missing)
    seen = places(k, w, w.where(shape)) or [START]
    return _question("present", f"is there a {shape}?", _piece("yes" if yes else "no", seen))


def _color(w: World, k: int, rng: random.Random) -> Question | None:
    if not w.single:
        return None
    shape = rng.choice(w.single)
    cell = w.where(shape)[0]
    return _question(
        "color", f"what color is the {shape}?", _piece(w.things[cell].color, places(k, w, [cell]))
    )


def _number(w: World, k: int, rng: random.Random) -> Question | None:
    if not w.numbers:
        return None
    cell, thing = rng.choice(w.numbers)
    return _question(
        "number", f"what is the {thing.color} number?", _piece(thing.number, places(k, w, [cell]))
    )


def describe(w: World, k: int, rng: random.Random) -> Question:
    """Everything in a fixed order, the ground last."""
    ground = places(k, w, w.empty)
    pieces = [_piece(w.time, ground), _piece(f", {w.texture}", ground)]
    if w.crowd:
        seen = places(k, w, w.where(w.crowd))
        color = w.things[w.where(w.crowd)[0]].color
        pieces += [
            _piece(f", {_amount(w, w.crowd)}", [*seen, *[START] * REST], seen),
            _piece(f" {color}", seen),
            _piece(f" {w.crowd}s", seen),
        ]
    for shape in w.single:
        seen = places(k, w, w.where(shape))
        pieces += [_piece(f", {shape}", seen), _piece(f" {w.things[w.where(shape)[0]].color}", seen)]
    for cell, thing in w.numbers:
        seen = places(k, w, [cell])
        pieces += [_piece(f", {thing.color}", seen), _piece(f" {thing.number}", seen)]
    return _question("describe", "describe it.", *pieces, _piece(f", ground {w.ground}", ground))


_SINGLE: dict[str, Callable[[World, int, random.Random], Question | None]] = {
    "ground": _ground, "texture": _texture, "time": _time, "empty": _empty, "common": _common,
    "count": _count, "at": _at, "where": _where, "present": _present, "color": _color, "number": _number,
    "describe": describe,
}  # fmt: skip


def _which(ws: list[World], rng: random.Random) -> Question | None:
    shown = Counter(s for w in ws for s in SHAPES if w.where(s))
    single = [s for s in SHAPES if shown[s] == 1]
    if not single:
        return None
    shape = rng.choice(single)
    k = next(i for i, w in enumerate(ws) if w.where(shape))
    seen = places(k, ws[k], ws[k].where(shape))
    return _question("which", f"which picture has a {shape}?", _piece(str(k + 1), seen))


def _which_scene(ws: list[World], rng: random.Random) -> Question | None:
    asked = []
    for what, text in (("ground", "which picture has a {} ground?"), ("texture", "which picture is {}?"),
                       ("time", "which picture shows {}?")):  # fmt: skip
        shown = Counter(getattr(w, what) for w in ws)
        asked += [(text.format(v), i) for i, w in enumerate(ws) if shown[v := getattr(w, what)] == 1]
    if not asked:
        return None
    text, k = rng.choice(asked)
    return _question("which_scene", text, _piece(str(k + 1), places(k, ws[k], ws[k].empty)))


def _same(ws: list[World], rng: random.Random) -> Question:
    pairs = [(i, j) for i in range(len(ws)) for j in range(i + 1, len(ws))]
    equal = [(i, j) for i, j in pairs if ws[i].ground == ws[j].ground]
    other = [p for p in pairs if p not in equal]
    i, j = rng.choice(equal if equal and (not other or rng.random() < 0.5) else other)
    seen = [places(x, ws[x], ws[x].empty) for x in (i, j)]
    text = f"have pictures {i + 1} and {j + 1} the same ground?"
    return _question("same_ground", text, _piece("yes" if (i, j) in equal else "no", *seen))


def _odd(ws: list[World], rng: random.Random) -> Question | None:
    counts = Counter(w.ground for w in ws)
    if len(ws) < 3 or sorted(counts.values()) != [1, len(ws) - 1]:
        return None
    k = next(i for i, w in enumerate(ws) if counts[w.ground] == 1)
    everywhere = [p for i, w in enumerate(ws) for p in places(i, w, w.empty)]
    return _question(
        "odd",
        "which ground is the odd one out?",
        _piece(str(k + 1), places(k, ws[k], ws[k].empty), everywhere),
    )


def _differ(ws: list[World], rng: random.Random) -> Question | None:
    asked = []
    for i in range(len(ws) - 1):
        a, b = ws[i], ws[i + 1]
        cells = [c for c in {*a.things, *b.things} if a.things.get(c) != b.things.get(c)]
        if len(cells) == 1 and (a.ground, a.texture, a.time) == (b.ground, b.texture, b.time):
            asked.append((i, cells[0]))
    if not asked:
        return None
    i, cell = rng.choice(asked)
    seen = [places(x, ws[x], [cell]) for x in (i + 1, i)]
    return _question("differ", f"where do pictures {i + 1} and {i + 2} differ?", _piece(name_of(cell), *seen))


_CROSS: dict[str, Callable[[list[World], random.Random], Question | None]] = {
    "which": _which, "which_scene": _which_scene, "same_ground": _same, "odd": _odd, "differ": _differ,
}  # fmt: skip

#: Every kind of question; the last ones need several pictures.
KINDS = (*_SINGLE, *_CROSS)

#: Words of a question that say what is asked for.
SUBJECTS = frozenset(
    {*COLORS, *SHAPES, *(f"{s}s" for s in SHAPES), "ground", "texture", "time", "empty", "common", "describe",
     "color", "many", "where", "number", "at", "odd", "differ", "same", *TEXTURES, *TIMES}
)  # fmt: skip


def ask(worlds: list[World], rng: random.Random, kind: str) -> Question | None:
    """A question of a kind, or None where the pictures give none."""
    if kind in _CROSS:
        return _CROSS[kind](worlds, rng) if len(worlds) > 1 else None
    k = rng.randrange(len(worlds))
    found = _SINGLE[kind](worlds[k], k, rng)
    if found is None:
        return None
    return Question(found.task, f"picture {k + 1}: {found.text}", found.answer, found.pieces)
