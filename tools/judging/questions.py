"""Questions about a picture, their only right answers, and where these are to be seen; all kinds together."""

import random
from collections.abc import Callable

from judging.comparisons import COMPARISONS
from judging.question import REST, START, Question, name_of, piece, places, question
from judging.world import COLORS, SHAPES, TEXTURES, TIMES, World


def _amount(world: World, shape: str) -> str:
    n = len(world.where(shape))
    return str(n) if n < 6 else "some" if n < world.grid**2 // 4 else "many"


def _ground(w: World, k: int, rng: random.Random) -> Question:
    return question("ground", "what color is the ground?", piece(w.ground, places(k, w, w.empty)))


def _texture(w: World, k: int, rng: random.Random) -> Question:
    return question("texture", "what is the texture?", piece(w.texture, places(k, w, w.empty)))


def _time(w: World, k: int, rng: random.Random) -> Question:
    return question("time", "what time is it?", piece(w.time, places(k, w, w.empty)))


def _empty(w: World, k: int, rng: random.Random) -> Question | None:
    occupied = len(w.things)
    if w.grid**2 / 4 < occupied < w.grid**2 / 3:
        return None
    everywhere = [(k, i) for i in range(w.grid**2)]
    return question(
        "empty", "is it mostly empty?", piece("no" if occupied > w.grid**2 / 4 else "yes", everywhere)
    )


def _common(w: World, k: int, rng: random.Random) -> Question | None:
    if not w.crowd:
        return None
    cells = w.where(w.crowd)
    seen = places(k, w, cells)
    color = w.things[cells[0]].color
    return question("common", "what is most common?", piece(color, seen), piece(f" {w.crowd}", seen))


def _count(w: World, k: int, rng: random.Random) -> Question:
    shape = w.crowd if w.crowd and rng.random() < 0.65 else rng.choice(SHAPES)
    seen = places(k, w, w.where(shape))
    amount = piece(_amount(w, shape), [*seen, *[START] * REST], seen or [START])
    return question("count", f"how many {shape}s?", amount)


def _at(w: World, k: int, rng: random.Random) -> Question:
    single = [c for c, t in w.things.items() if t.shape != w.crowd]
    cell = rng.choice(single if rng.random() < 0.6 else w.empty if rng.random() < 0.5 else list(w.things))
    seen = places(k, w, [cell])
    text = f"what is at {name_of(cell)}?"
    thing = w.things.get(cell)
    if thing is None:
        return question("at", text, piece("nothing", seen))
    if thing.number:
        return question("at", text, piece(thing.number, seen))
    return question("at", text, piece(thing.color, seen), piece(f" {thing.shape}", seen))


def _where(w: World, k: int, rng: random.Random) -> Question | None:
    if not w.single:
        return None
    shape = rng.choice(w.single)
    cell = w.where(shape)[0]
    return question("where", f"where is the {shape}?", piece(name_of(cell), places(k, w, [cell])))


def _present(w: World, k: int, rng: random.Random) -> Question:
    there = [s for s in SHAPES if w.where(s)]
    missing = [s for s in SHAPES if s not in there]
    yes = rng.random() < 0.5
    shape = rng.choice(there if yes else missing)
    seen = places(k, w, w.where(shape)) or [START]
    return question("present", f"is there a {shape}?", piece("yes" if yes else "no", seen))


def _color(w: World, k: int, rng: random.Random) -> Question | None:
    if not w.single:
        return None
    shape = rng.choice(w.single)
    cell = w.where(shape)[0]
    return question("color", f"what color is the {shape}?", piece(w.things[cell].color, places(k, w, [cell])))


def _number(w: World, k: int, rng: random.Random) -> Question | None:
    if not w.numbers:
        return None
    cell, thing = rng.choice(w.numbers)
    return question("number", f"what is the {thing.color} number?", piece(thing.number, places(k, w, [cell])))


def describe(w: World, k: int, rng: random.Random) -> Question:
    """Everything in a fixed order, the ground last."""
    ground = places(k, w, w.empty)
    pieces = [piece(w.time, ground), piece(f", {w.texture}", ground)]
    if w.crowd:
        seen = places(k, w, w.where(w.crowd))
        color = w.things[w.where(w.crowd)[0]].color
        pieces += [
            piece(f", {_amount(w, w.crowd)}", [*seen, *[START] * REST], seen),
            piece(f" {color}", seen),
            piece(f" {w.crowd}s", seen),
        ]
    for shape in w.single:
        seen = places(k, w, w.where(shape))
        pieces += [piece(f", {shape}", seen), piece(f" {w.things[w.where(shape)[0]].color}", seen)]
    for cell, thing in w.numbers:
        seen = places(k, w, [cell])
        pieces += [piece(f", {thing.color}", seen), piece(f" {thing.number}", seen)]
    return question("describe", "describe it.", *pieces, piece(f", ground {w.ground}", ground))


_SINGLE: dict[str, Callable[[World, int, random.Random], Question | None]] = {
    "ground": _ground, "texture": _texture, "time": _time, "empty": _empty, "common": _common,
    "count": _count, "at": _at, "where": _where, "present": _present, "color": _color, "number": _number,
    "describe": describe,
}  # fmt: skip


#: Every kind of question; the last ones need several pictures.
KINDS = (*_SINGLE, *COMPARISONS)

#: Words of a question that say what is asked for.
SUBJECTS = frozenset(
    {*COLORS, *SHAPES, *(f"{s}s" for s in SHAPES), "ground", "texture", "time", "empty", "common", "describe",
     "color", "many", "where", "number", "at", "odd", "differ", "same", *TEXTURES, *TIMES}
)  # fmt: skip


def ask(worlds: list[World], rng: random.Random, kind: str) -> Question | None:
    """A question of a kind, or None where the pictures give none."""
    if kind in COMPARISONS:
        return COMPARISONS[kind](worlds, rng) if len(worlds) > 1 else None
    k = rng.randrange(len(worlds))
    found = _SINGLE[kind](worlds[k], k, rng)
    if found is None:
        return None
    return Question(found.task, f"picture {k + 1}: {found.text}", found.answer, found.pieces)
