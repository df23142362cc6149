"""Prompts of capsight-smol: pictures and questions about them, about one image or across images."""

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from PIL import Image

from judging.smol.pictures import SPLITS, Picture, Pictures
from judging.smol.words import SORTS


@dataclass(frozen=True, slots=True)
class Question:
    """A question, its answer, and the kind it belongs to (called task as in the other judges)."""

    task: str
    text: str
    answer: str


@dataclass(frozen=True, slots=True)
class Prompt:
    """Pictures and the questions asked of them, each on its own."""

    pictures: tuple[Picture, ...]
    questions: tuple[Question, ...]

    @property
    def images(self) -> tuple[Image.Image, ...]:
        """The pictures for a processor."""
        return tuple(p.pil for p in self.pictures)


Made = Question | None


def _what(p: list[Picture], rng: random.Random, k: int) -> Made:
    if p[k].sort == "page":
        return Question("word", f"What word is in image {k + 1}?", p[k].name)
    return Question(p[k].sort, f"What is in image {k + 1}?", p[k].name)


def _number(p: list[Picture], rng: random.Random, k: int) -> Made:
    return Question("number", f"What number is in image {k + 1}?", p[k].number) if p[k].number else None


def _color(p: list[Picture], rng: random.Random, k: int) -> Made:
    return Question("color", f"What color is image {k + 1}?", p[k].color) if p[k].color else None


def _sort(p: list[Picture], rng: random.Random, k: int) -> Made:
    return Question("sort", f"What kind of image is image {k + 1}?", p[k].sort)


def _single(p: list[Picture], k: int) -> bool:
    return sum(x.name == p[k].name for x in p) == 1


def _find(p: list[Picture], rng: random.Random, k: int) -> Made:
    if len(p) == 1 or not _single(p, k):
        return None
    verb = "says" if p[k].sort == "page" else "shows"
    return Question("find", f"Which image {verb} {p[k].name}?", str(k + 1))


def _after(p: list[Picture], rng: random.Random, k: int) -> Made:
    if k == 0 or not _single(p, k - 1):
        return None
    return Question("after", f"What is in the image after {p[k - 1].name}?", p[k].name)


def _same(p: list[Picture], rng: random.Random, k: int) -> Made:
    others = [j for j in range(len(p)) if j != k]
    equal = [j for j in others if p[j].name == p[k].name]
    unequal = [j for j in others if j not in equal]
    if not others:
        return None
    pool = equal if equal and (not unequal or rng.random() < 0.5) else unequal
    if pool is unequal and not equal and rng.random() < 0.5:
        return None
    a, b = sorted((k, rng.choice(pool)))
    return Question("same", f"Are images {a + 1} and {b + 1} the same?", "yes" if pool is equal else "no")


def _odd(p: list[Picture], rng: random.Random, k: int) -> Made:
    counts = Counter(x.sort for x in p)
    if len(p) < 3 or sorted(counts.values()) != [1, len(p) - 1]:
        return None
    odd = min(counts, key=lambda s: counts[s])
    return Question(
        "odd", "Which image is the odd one out?", str(next(i for i, x in enumerate(p, 1) if x.sort == odd))
    )


def _order(p: list[Picture], rng: random.Random, k: int) -> Made:
    if len(p) == 1:
        return None
    first = min(k, max(0, len(p) - 3))
    listed = p[first : first + 3]
    text = f"List images {first + 1} to {first + len(listed)} in order."
    return Question("order", text, ", ".join(x.name for x in listed))


_MAKERS: dict[str, Callable[[list[Picture], random.Random, int], Made]] = {
    "what": _what, "number": _number, "color": _color, "sort": _sort, "find": _find, "after": _after,
    "same": _same, "odd": _odd, "order": _order,
}  # fmt: skip
_ACROSS = ("find", "after", "same", "odd", "order")
#: About one image, then across images.
KINDS = ("photo", "icon", "shape", "word", "number", "color", "sort", "find", "after", "same", "odd", "order")
#: What the judge learnt by its training and `dev` questions, and is asked.
ASKED = tuple(kind for kind in KINDS if kind != "odd")


def split_rng(split: str, index: int, stream: str) -> random.Random:
    """The source of randomness of prompt `index` of a split."""
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; use one of {', '.join(SPLITS)}")
    return random.Random(f"capsight/smol/{split}/{stream}/{index}")


def _draw(source: Pictures, rng: random.Random, images: int) -> list[Picture]:
    """Unrelated images, some repeated, or all but one of the same sort."""
    roll = rng.random()
    if images > 2 and roll < 0.25:
        usual, odd = rng.sample(SORTS, 2)
        sorts = [usual] * images
        sorts[rng.randrange(images)] = odd
        return [source.draw(rng, s) for s in sorts]
    pictures = [source.draw(rng) for _ in range(images)]
    while images > 1 and roll < 0.7 and rng.random() < 0.7:
        a, b = rng.sample(range(images), 2)
        if pictures[a].sort != "shape":  # the same thing again, drawn or photographed anew
            pictures[b] = source.draw(rng, pictures[a].sort, pictures[a].name)
    return pictures


def ask(
    pictures: Sequence[Picture],
    rng: random.Random,
    questions: int,
    kinds: Sequence[str] = KINDS,
    across: int = 1,
) -> tuple[Question, ...]:
    """Up to `questions` different questions of `kinds`; those across images `across` times as frequent."""
    asked: dict[str, Question] = {}
    names: list[str] = []
    pool = ["what", "what", *_MAKERS, *_ACROSS * (across - 1)]
    for _ in range(6 * questions):
        names = names or rng.sample(pool, len(pool))
        question = _MAKERS[names.pop()](list(pictures), rng, rng.randrange(len(pictures)))
        if question is not None and question.task in kinds:
            asked.setdefault(question.text, question)
        if len(asked) == questions:
            break
    return tuple(asked.values())


def draw_prompt(
    source: Pictures,
    rng: random.Random,
    images: int,
    questions: int,
    kinds: Sequence[str] = KINDS,
    across: int = 1,
) -> Prompt:
    """Draw `images` pictures and ask about them; see `ask`, which the splits call with `across=1`."""
    pictures = _draw(source, rng, images)
    return Prompt(tuple(pictures), ask(pictures, rng, questions, kinds, across))
