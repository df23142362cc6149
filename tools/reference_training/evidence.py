"""Where on the pages the answer to a question is to be seen: targets of the pointing lesson.

A place is ``(image, cell)``: the index of an image of the prompt and the index of one of its merged tokens,
or `END` for the token that closes the image, or `NUMBER` for the token of its number. `START` is the prompt's
first token: what counting heads look at beside the counted, since a softmax alone only knows shares.
"""

import re

from capsight.reference.drawing import Scene
from capsight.reference.drawing.canvas import CELL
from capsight.reference.prompts import Prompt
from capsight.reference.questions import PLURAL, Question

Place = tuple[int, int]
END, NUMBER = -1, -2
START: Place = (-1, 0)

#: How many times what is counted a counting head looks at the place beside it.
REST = 4

#: What two heads should look at while one character of the answer is said.
Look = tuple[list[Place], list[Place]]

_KIND = {plural: kind for kind, plural in PLURAL.items()}


def _cell(scene: Scene, x: float, y: float) -> int:
    columns, rows = scene.image.width // CELL, scene.image.height // CELL
    return min(rows - 1, int(y // CELL)) * columns + min(columns - 1, int(x // CELL))


def text_cells(scene: Scene, about: str) -> list[int]:
    """The cell of every character of the text about ``about``, in reading order."""
    return [_cell(scene, g.x, g.y) for g in scene.glyphs if g.about == about]


def word_cells(scene: Scene, word: str) -> list[int]:
    """The cells that a word covers."""
    return [_cell(scene, w.x, w.y) for w in scene.words if w.word == word]


def mark_cells(scene: Scene, shape: str | None = None, color: str | None = None) -> list[int]:
    """The cells of the marks of a shape or a colour, or of all."""
    return [
        _cell(scene, m.x, m.y) for m in scene.marks if shape in (None, m.shape) and color in (None, m.color)
    ]


def content_cells(scene: Scene) -> list[int]:
    """All cells that something is drawn in."""
    where = [(d.x, d.y) for drawn in (scene.glyphs, scene.words, scene.marks) for d in drawn]
    return sorted({_cell(scene, x, y) for x, y in where})


def bindings(scene: Scene) -> list[tuple[int, list[int], list[int]]]:
    """Which cells tell what a value is about: (cell of the value, two lists of such cells).

    The word left of a code or price, the bar above a number, the letter and the number of a table's cell.
    """
    found = []
    for about in sorted({g.about for g in scene.glyphs if g.about}):
        if scene.kind == "table":
            heads = [
                [_cell(scene, g.x, g.y) for g in scene.glyphs if not g.about and g.char == c] for c in about
            ]
        elif scene.kind == "chart":
            heads = [mark_cells(scene, color=about)] * 2
        else:
            heads = [word_cells(scene, about)] * 2
        if heads[0]:
            found += [(cell, heads[0], heads[1]) for cell in sorted(set(text_cells(scene, about)))]
    return found


def _about(task: str, text: str, answer: str) -> str:
    """What the text that holds the answer is about."""
    if task == "cell":
        row, column = re.findall(r"row (\w), column (\d)", text)[0]
        return row + column
    if task in ("bar_extreme", "priciest"):
        return answer
    fixed = {"small_print": "small print", "total": "total", "plate": "plate"}
    return fixed.get(task) or re.findall(r"the (\w+) (?:code|bar|cost)", text)[0]


def _of_one(scene: Scene, image: int, task: str, text: str, answer: str) -> list[Look]:
    if task == "shape_color":
        cells = mark_cells(scene, shape=text.split()[-1].rstrip("?"))
    elif task == "count_shapes":
        places = [(image, c) for c in mark_cells(scene)]
        return [([*places, *[(image, NUMBER)] * REST], [(image, END)])]
    else:
        cells = text_cells(scene, _about(task, text, answer))
        if task in ("bar_extreme", "priciest"):
            cells = cells[:1]
        else:
            return [([(image, c)], [(image, c)]) for c in cells]
    places = [(image, c) for c in cells]
    return [(places, places)]


def _of_many(prompt: Prompt, task: str, text: str, answer: str) -> list[Look]:
    scenes = prompt.scenes
    ends: list[Place] = [(i, END) for i in range(len(scenes))]
    numbers = [int(n) - 1 for n in re.findall(r"\d", text)]
    if task == "order":
        looks = []
        for k, word in enumerate(answer.split(" ")):
            looks += [([(k, END)], [(k, END)])] * (len(word) + 1)
        return looks[1:]  # the space before a word belongs to that word
    if task in ("same_kind", "compare"):
        if "total" in text:
            first, second = ([(i, c) for c in text_cells(scenes[i], "total")[:2]] for i in numbers)
        else:
            first, second = ([(i, END)] for i in numbers)
        return [(first, second)]
    if task == "count_images":
        kind = _KIND[text.removeprefix("How many images are ").rstrip("?")]
        counted = [(i, END) for i, s in enumerate(scenes) if s.kind == kind]
        return [([START, *ends], [*counted, *[START] * REST])]
    image = int(answer) - 1
    if task == "odd_one_out":
        return [(ends, [(image, END)])]
    cells: list[int] = []  # find
    if found := re.search(r"(?:has a|lists|shows a) (\w+)", text):
        cells = word_cells(scenes[image], found[1]) or mark_cells(scenes[image], shape=found[1])
    places = [(image, c) for c in cells or [END]]
    return [(places, places)]


def evidence(prompt: Prompt, question: Question) -> list[Look]:
    """Where to look for each character of the answer; one entry when it is the same for all."""
    if found := re.match(r"Image (\d): (.*)", question.text):
        image = int(found[1]) - 1
        return _of_one(prompt.scenes[image], image, question.task, found[2], question.answer)
    return _of_many(prompt, question.task, question.text, question.answer)
