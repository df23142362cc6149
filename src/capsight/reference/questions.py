"""Questions about drawn scenes, and their only right answers.

Single-image questions name their image ("Image 2: ..."); cross-image questions need several images at once.
"""

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from capsight.reference.drawing import KINDS, Scene

#: How a kind of image is called in questions and answers.
PLURAL = {
    "card": "cards",
    "receipt": "receipts",
    "table": "tables",
    "chart": "charts",
    "shapes": "shape pages",
    "plate": "plates",
}


@dataclass(frozen=True, slots=True)
class Question:
    """A question, its answer, and the task it belongs to."""

    task: str
    text: str
    answer: str


def _card(s: Scene, rng: random.Random) -> tuple[str, str, str]:
    if "small_print" in s.facts and rng.random() < 0.3:
        return "small_print", "what is the small print?", s.facts["small_print"]
    label = rng.choice(list(s.facts["codes"]))
    return "read_code", f"what is the {label} code?", s.facts["codes"][label]


def _receipt(s: Scene, rng: random.Random) -> tuple[str, str, str]:
    prices: dict[str, str] = s.facts["prices"]
    roll = rng.random()
    if "total" in s.facts and roll < 0.2:
        return "total", "what is the total?", s.facts["total"]
    if roll < 0.35:
        return "priciest", "which item costs the most?", max(prices, key=lambda k: float(prices[k]))
    item = rng.choice(list(prices))
    return "price", f"what does the {item} cost?", prices[item]


def _table(s: Scene, rng: random.Random) -> tuple[str, str, str]:
    row, column = rng.choice(list(s.facts["cells"]))
    return "cell", f"what is in row {row}, column {column}?", s.facts["cells"][row, column]


def _chart(s: Scene, rng: random.Random) -> tuple[str, str, str]:
    bars: dict[str, int] = s.facts["bars"]
    if rng.random() < 0.3:
        word, pick = rng.choice((("highest", max), ("lowest", min)))
        return "bar_extreme", f"which bar is the {word}?", pick(bars, key=lambda k: bars[k])
    color = rng.choice(list(bars))
    return "bar_height", f"how high is the {color} bar?", str(bars[color])


def _shapes(s: Scene, rng: random.Random) -> tuple[str, str, str]:
    shapes: list[tuple[str, str]] = s.facts["shapes"]
    by_shape = Counter(shape for shape, _ in shapes)
    single = [(shape, color) for shape, color in shapes if by_shape[shape] == 1]
    if single and rng.random() < 0.6:
        shape, color = rng.choice(single)
        return "shape_color", f"what color is the {shape}?", color
    return "count_shapes", "how many shapes are there?", str(len(shapes))


def _plate(s: Scene, rng: random.Random) -> tuple[str, str, str]:
    return "plate", "what is on the plate?", s.facts["code"]


_SINGLE: dict[str, Callable[[Scene, random.Random], tuple[str, str, str]]] = {
    "card": _card,
    "receipt": _receipt,
    "table": _table,
    "chart": _chart,
    "shapes": _shapes,
    "plate": _plate,
}


def single_image_question(scenes: list[Scene], rng: random.Random) -> Question:
    """Ask something about one image of the prompt."""
    index = rng.randrange(len(scenes))
    task, text, answer = _SINGLE[scenes[index].kind](scenes[index], rng)
    return Question(task, f"Image {index + 1}: {text}", answer)


def _find(scenes: list[Scene], rng: random.Random) -> Question | None:
    """The one image that shows something no other image of the prompt shows."""
    shown: dict[str, list[int]] = {}
    for i, s in enumerate(scenes, 1):
        things = {f"is a {s.kind}" if s.kind != "shapes" else "is a shape page"}
        if s.kind == "card":
            things |= {f"has a {label} code" for label in s.facts["codes"]}
        elif s.kind == "receipt":
            things |= {f"lists {item}" for item in s.facts["prices"]}
        elif s.kind == "shapes":
            things |= {f"shows a {shape}" for shape, _ in s.facts["shapes"]}
        for thing in things:
            shown.setdefault(thing, []).append(i)
    single = sorted(t for t, where in shown.items() if len(where) == 1)
    if not single:
        return None
    thing = rng.choice(single)
    return Question("find", f"Which image {thing}?", str(shown[thing][0]))


def _count(scenes: list[Scene], rng: random.Random) -> Question | None:
    kind = rng.choice(scenes).kind if rng.random() < 0.8 else rng.choice(KINDS)
    return Question(
        "count_images", f"How many images are {PLURAL[kind]}?", str(sum(s.kind == kind for s in scenes))
    )


def _same(scenes: list[Scene], rng: random.Random) -> Question | None:
    pairs = [(i, j) for i in range(len(scenes)) for j in range(i + 1, len(scenes))]
    equal = [p for p in pairs if scenes[p[0]].kind == scenes[p[1]].kind]
    other = [p for p in pairs if p not in equal]
    pool = equal if equal and (not other or rng.random() < 0.5) else other
    i, j = rng.choice(pool)
    text = f"Are images {i + 1} and {j + 1} of the same kind?"
    return Question("same_kind", text, "yes" if pool is equal else "no")


def _order(scenes: list[Scene], rng: random.Random) -> Question | None:
    return Question("order", "What are the images, in order?", " ".join(s.kind for s in scenes))


def _odd(scenes: list[Scene], rng: random.Random) -> Question | None:
    counts = Counter(s.kind for s in scenes)
    if len(scenes) < 3 or sorted(counts.values()) != [1, len(scenes) - 1]:
        return None
    odd = min(counts, key=lambda k: counts[k])
    where = next(i for i, s in enumerate(scenes, 1) if s.kind == odd)
    return Question("odd_one_out", "Which image is the odd one out?", str(where))


def _compare(scenes: list[Scene], rng: random.Random) -> Question | None:
    def pairs(
        kind: str, value: Callable[[Scene], float], apart: float
    ) -> list[tuple[int, int, float, float]]:
        valued = [(i, value(s)) for i, s in enumerate(scenes, 1) if s.kind == kind]
        return [(i, j, a, b) for i, a in valued for j, b in valued if i < j and abs(a - b) >= apart]

    asks = [("has more shapes", p) for p in pairs("shapes", lambda s: len(s.facts["shapes"]), 1)]
    asks += [("has the larger total", p) for p in pairs("receipt", _sum_of_prices, 2)]
    if not asks:
        return None
    what, (i, j, a, b) = rng.choice(asks)
    return Question("compare", f"Which {what}, image {i} or image {j}?", str(i if a > b else j))


def _sum_of_prices(scene: Scene) -> float:
    return sum(map(float, scene.facts["prices"].values()))


_CROSS = (_find, _count, _same, _order, _odd, _compare)


#: Every task name, single-image tasks first.
TASKS = (
    "read_code", "small_print", "price", "total", "priciest", "cell", "bar_height", "bar_extreme",
    "shape_color", "count_shapes", "plate",
    "find", "count_images", "same_kind", "order", "odd_one_out", "compare",
)  # fmt: skip
CROSS_TASKS = TASKS[11:]


def cross_image_question(scenes: list[Scene], rng: random.Random) -> Question:
    """Ask something that needs several images; `scenes` holds two or more."""
    while True:
        question = rng.choice(_CROSS)(scenes, rng)
        if question is not None:
            return question


def ask(scenes: list[Scene], rng: random.Random, cross: float = 0.35) -> Question:
    """Ask one question; with two or more images it is a cross-image one with probability ``cross``."""
    if len(scenes) > 1 and rng.random() < cross:
        return cross_image_question(scenes, rng)
    return single_image_question(scenes, rng)
