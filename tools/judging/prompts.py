"""Prompts of a judge's task, and the disjoint splits they come from."""

import random
from dataclasses import dataclass

from PIL import Image

from judging.drawing import Style, draw
from judging.question import Question
from judging.questions import KINDS, ask
from judging.world import COLORS, World, change_one, draw_world

SPLITS = ("train", "calibration", "dev", "test")


@dataclass(frozen=True, slots=True)
class Scene:
    """One picture and what is true of it."""

    image: Image.Image
    world: World


@dataclass(frozen=True, slots=True)
class Prompt:
    """Pictures and the questions asked of them, each on its own."""

    scenes: tuple[Scene, ...]
    questions: tuple[Question, ...]

    @property
    def images(self) -> tuple[Image.Image, ...]:
        """The pictures."""
        return tuple(s.image for s in self.scenes)


def split_rng(judge: str, split: str, index: int, stream: str) -> random.Random:
    """The source of randomness of prompt `index` of a split; every split has seeds of its own."""
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; use one of {', '.join(SPLITS)}")
    return random.Random(f"capsight/judges/{judge}/{split}/{stream}/{index}")


def draw_worlds(rng: random.Random, grid: int, pictures: int) -> list[World]:
    """Worlds of one prompt: unrelated ones, nearly equal neighbours, or all but one on the same ground."""
    roll = rng.random()
    if pictures > 1 and roll < 0.35:
        worlds = [draw_world(rng, grid)]
        while len(worlds) < pictures:
            near = len(worlds) % 2 == 1
            worlds.append(change_one(rng, worlds[-1])[0] if near else draw_world(rng, grid))
        return worlds
    if pictures > 2 and roll < 0.65:
        usual, odd = rng.sample(COLORS, 2)
        grounds = [usual] * pictures
        grounds[rng.randrange(pictures)] = odd
        return [draw_world(rng, grid, g) for g in grounds]
    return [draw_world(rng, grid) for _ in range(pictures)]


def draw_prompt(
    rng: random.Random, grid: int, style: Style, pictures: int, questions: int, kinds: tuple[str, ...] = KINDS
) -> Prompt:
    """Draw pictures and ask different questions about them, all kinds in turn."""
    worlds = draw_worlds(rng, grid, pictures)
    asked: dict[str, Question] = {}
    order: list[str] = []
    for _ in range(4 * questions):
        if not order:
            order = rng.sample(kinds, len(kinds))
        question = ask(worlds, rng, order.pop())
        if question is not None:
            asked.setdefault(question.text, question)
        if len(asked) == questions:
            break
    return Prompt(tuple(Scene(draw(w, style, rng), w) for w in worlds), tuple(asked.values()))
