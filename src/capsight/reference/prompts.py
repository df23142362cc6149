"""Prompts of the reference task, and the three disjoint splits they come from."""

import random
from dataclasses import dataclass
from typing import Literal

from capsight.errors import OptionError
from capsight.reference.drawing import KINDS, Scene, draw_scene
from capsight.reference.questions import Question, ask

Split = Literal["train", "calibration", "test"]

#: Every split draws from its own seeds, so no image or question of one is drawn for another.
_SPLIT_SALT: dict[str, str] = {
    "train": "capsight/train",
    "calibration": "capsight/calibration",
    "test": "capsight/test",
}


@dataclass(frozen=True, slots=True)
class Prompt:
    """Images and the questions asked of them, one after the other."""

    scenes: tuple[Scene, ...]
    questions: tuple[Question, ...]


def split_rng(split: Split, index: int, stream: str = "") -> random.Random:
    """The source of randomness of sample ``index`` of ``split``; ``stream`` keeps uses of a split apart."""
    if split not in _SPLIT_SALT:
        raise OptionError(f"split is {split!r}; use one of {', '.join(_SPLIT_SALT)}.")
    return random.Random(f"{_SPLIT_SALT[split]}/{stream}/{index}")


def draw_kinds(rng: random.Random, images: int) -> list[str]:
    """Draw the kinds of the images; now and then all but one are the same (for odd-one-out)."""
    if images >= 3 and rng.random() < 0.2:
        usual, odd = rng.sample(KINDS, 2)
        kinds = [usual] * images
        kinds[rng.randrange(images)] = odd
        return kinds
    return [rng.choice(KINDS) for _ in range(images)]


def draw_prompt(
    rng: random.Random,
    images: int,
    questions: int,
    large: float = 0.5,
    cross: float = 0.35,
    little: float = 0.0,
) -> Prompt:
    """Draw ``images`` scenes and ask ``questions`` different questions about them."""
    scenes = [draw_scene(rng, kind, large, little) for kind in draw_kinds(rng, images)]
    return ask_about(rng, scenes, questions, cross)


def ask_about(rng: random.Random, scenes: list[Scene], questions: int, cross: float) -> Prompt:
    """Ask ``questions`` different questions about scenes (fewer where they give no more)."""
    asked: dict[str, Question] = {}
    for _ in range(4 * questions):
        question = ask(scenes, rng, cross)
        asked.setdefault(question.text, question)
        if len(asked) == questions:
            break
    return Prompt(tuple(scenes), tuple(asked.values()))


def split_prompt(split: Split, index: int, images: int, questions: int = 6) -> Prompt:
    """Prompt ``index`` of a split at an image count; equal arguments give equal prompts on any machine."""
    return draw_prompt(split_rng(split, index, f"{images} images"), images, questions)
