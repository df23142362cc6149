"""Prompts that make image tokens look at other images: things that come twice, without saying which.

A question that names what it is about (`find`, `same`) is answered by text that looks it up, whatever
image tokens saw. Which of eight pictures comes twice cannot be looked up: each has to be held against
every earlier one, and only its own tokens can do that, in parallel, while it is read.
"""

import random
from collections.abc import Sequence

from judging.smol.asks import ASKED, Prompt, Question, ask, split_rng
from judging.smol.pictures import Picture, Pictures
from judging.smol.words import SORTS

REPEATS = ("twice",)
_PAIRS = (1, 4, 2)  # how often none, one, two things come twice
_SORTS = (2, 4, 1, 3)  # photo, icon, shape, page


def repeated(pictures: Sequence[Picture]) -> list[int]:
    """For every picture the index of the earlier one with the same name, or -1."""
    names = [p.name for p in pictures]
    return [names.index(name) if name in names[:i] else -1 for i, name in enumerate(names)]


def _scene(source: Pictures, rng: random.Random, images: int) -> list[Picture]:
    """Different things, none, one or two of them shown a second time, drawn or photographed anew."""
    pairs = rng.choices(range(3), _PAIRS)[0] if images > 3 else rng.randrange(2)
    things: dict[str, Picture] = {}
    while len(things) < images - pairs:
        sort = rng.choices(SORTS, _SORTS)[0]
        if sort != "shape" or len(things) >= pairs:  # a shape cannot be asked for by name
            drawn = source.draw(rng, sort)
            things.setdefault(drawn.name, drawn)
    twice = rng.sample([t for t in things.values() if t.sort != "shape"], pairs)
    order = [*things.values(), *twice]
    rng.shuffle(order)
    names = [p.name for p in order]
    return [
        source.draw(rng, p.sort, p.name) if p.name in names[:i] else p for i, p in enumerate(order)
    ]  # fmt: skip


def _twice(pictures: Sequence[Picture]) -> Question:
    """What comes twice, in the order of the second times."""
    found = [p.name for p, first in zip(pictures, repeated(pictures), strict=True) if first >= 0]
    return Question("twice", "What is shown twice?", ", ".join(found) or "nothing")


def repeats_rng(split: str, index: int, images: int) -> random.Random:
    """The source of randomness of prompt `index` of a split."""
    return split_rng(split, index, f"repeats, {images} images")


def draw_repeats(
    source: Pictures, rng: random.Random, images: int, questions: int = 1, across: int = 1
) -> Prompt:
    """Draw pictures; ask what comes twice, and then other questions that `smol` is asked."""
    pictures = _scene(source, rng, images)
    others = ask(pictures, rng, questions - 1, ASKED, across) if questions > 1 else ()
    return Prompt(tuple(pictures), (_twice(pictures), *others))
