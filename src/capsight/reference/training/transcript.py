"""An exercise of training only: say everything that is on an image, from top left to bottom right."""

import random
from collections.abc import Callable

from capsight.reference.drawing import Scene
from capsight.reference.drawing.canvas import CELL
from capsight.reference.prompts import Prompt
from capsight.reference.questions import Question


def _card(s: Scene) -> list[str]:
    return [*(x for pair in s.facts["codes"].items() for x in pair), s.facts["small_print"]]


def _receipt(s: Scene) -> list[str]:
    return [*(x for pair in s.facts["prices"].items() for x in pair), "total", s.facts["total"]]


def _table(s: Scene) -> list[str]:
    cells: dict[tuple[str, int], str] = s.facts["cells"]
    return [x for (row, column), v in cells.items() for x in ((row, v) if column == 1 else (v,))]


def _chart(s: Scene) -> list[str]:
    return [str(x) for pair in s.facts["bars"].items() for x in pair]


def _shapes(s: Scene) -> list[str]:
    marks = sorted(s.marks, key=lambda m: (m.y // CELL, m.x))
    return [x for m in marks for x in (m.color, m.shape)]


def _plate(s: Scene) -> list[str]:
    return [s.facts["code"]]


_SAY: dict[str, Callable[[Scene], list[str]]] = {
    "card": _card,
    "receipt": _receipt,
    "table": _table,
    "chart": _chart,
    "shapes": _shapes,
    "plate": _plate,
}


def with_transcript(prompt: Prompt, rng: random.Random) -> Prompt:
    """Add the exercise about one of the prompt's images, somewhere among its questions."""
    index = rng.randrange(len(prompt.scenes))
    scene = prompt.scenes[index]
    exercise = Question(
        "transcript", f"Image {index + 1}: what is in order?", " ".join(_SAY[scene.kind](scene))
    )
    questions = list(prompt.questions)
    questions.insert(rng.randint(0, len(questions)), exercise)
    return Prompt(prompt.scenes, tuple(questions))
