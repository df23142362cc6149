"""The lessons: see (dense labels), read (one or two pages), compare (one to eight), finish, count, drill."""

import random
from collections import Counter
from dataclasses import dataclass

from capsight.reference.drawing import KINDS, draw_scene
from capsight.reference.drawing.scene import Scene
from capsight.reference.prompts import Prompt, ask_about, draw_kinds, draw_prompt, split_rng
from capsight.reference.questions import PLURAL, Question
from reference_training.dense import text_page


@dataclass(frozen=True, slots=True)
class Stage:
    """One lesson.

    Attributes:
        name: name of the stage.
        steps: optimiser steps.
        images: images a step, shared out over its prompts.
        counts: image counts of a prompt; one is drawn for each step.
        lr: learning rate at the start, after a short warm-up.
        end: learning rate at the end; in between it falls linearly.
        large: probability of a page of 128 instead of 64 vision tokens.
        cross: probability that a question needs several images.
        little: probability of a page of few vision tokens.
        pointing: weight of the pointing lesson.
        counting: probability of a prompt that asks for every count there is, with many pages of shapes.
        vision: the vision tower's learning rate over the language model's; 0 freezes it.
    """

    name: str
    steps: int
    images: int
    counts: tuple[int, ...]
    lr: float
    end: float
    large: float
    cross: float = 0.35
    little: float = 0.0
    pointing: float = 0.0
    vision: float = 0.0
    counting: float = 0.0


STAGES = (
    Stage("see", 600, 24, (), 1.2e-3, 3e-5, large=0.2, vision=1.0),
    Stage("read", 600, 16, (1, 1, 2), 1.2e-3, 1.1e-3, large=0.1, little=0.3, pointing=0.3),
    Stage("compare", 1700, 16, (1, 2, 3, 4, 6, 8), 1.1e-3, 5e-4, 0.3, 0.4, little=0.05, pointing=0.2),
    Stage("finish", 1900, 16, (1, 2, 4, 6, 8), 6e-4, 1e-5, large=0.3, cross=0.4, pointing=0.2),
    Stage("count", 1100, 16, (1, 2, 4, 6, 8, 8), 5e-4, 1.15e-4, large=0.3, cross=0.5, pointing=0.2),
    Stage("drill", 700, 16, (1, 2, 4, 6, 8, 8), 3e-4, 1e-6, large=0.3, cross=0.5, pointing=0.2, counting=0.5),
)


def pages(stage: Stage, step: int) -> list[Scene]:
    """The pictures of one step of the first stage: a quarter of them pages of text."""
    rng = split_rng("train", step, stage.name)
    return [text_page(rng) if i % 4 == 3 else draw_scene(rng, None, stage.large) for i in range(stage.images)]


def prompts(stage: Stage, step: int) -> list[Prompt]:
    """The prompts of one step: all with the same number of images, ten questions and more each."""
    rng: random.Random = split_rng("train", step, stage.name)
    count = rng.choice(stage.counts)
    return [_prompt(stage, rng, count) for _ in range(max(1, stage.images // count))]


def _prompt(stage: Stage, rng: random.Random, images: int) -> Prompt:
    questions = 10 + 2 * images
    if rng.random() >= stage.counting:
        return draw_prompt(rng, images, questions, stage.large, stage.cross, stage.little)
    kinds = [rng.choice((kind, "shapes")) for kind in draw_kinds(rng, images)]
    scenes = [draw_scene(rng, kind, stage.large, stage.little) for kind in kinds]
    counts = counting_questions(scenes)
    others = ask_about(rng, scenes, questions // 2, stage.cross).questions
    asked = [*counts, *(q for q in others if q not in counts)]
    rng.shuffle(asked)
    return Prompt(tuple(scenes), tuple(asked))


def counting_questions(scenes: list[Scene]) -> list[Question]:
    """Every count that can be asked: of images of each kind, of the shapes on each page of them."""
    kinds = Counter(s.kind for s in scenes)
    found = [Question("count_images", f"How many images are {PLURAL[k]}?", str(kinds[k])) for k in KINDS]
    for number, scene in enumerate(scenes, 1):
        if scene.kind == "shapes":
            count = str(len(scene.facts["shapes"]))
            found.append(Question("count_shapes", f"Image {number}: how many shapes are there?", count))
    return found if len(scenes) > 1 else found[len(KINDS) :]
