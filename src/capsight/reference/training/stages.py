"""The lessons: see (dense labels), spell (a little page), read (one or two pages), compare (one to eight)."""

import random
from dataclasses import dataclass

from capsight.reference.drawing import draw_scene
from capsight.reference.drawing.scene import Scene
from capsight.reference.prompts import Prompt, draw_prompt, split_rng
from capsight.reference.training.dense import text_page
from capsight.reference.training.transcript import with_transcript


@dataclass(frozen=True, slots=True)
class Stage:
    """One lesson.

    Attributes:
        name: name of the stage.
        steps: optimiser steps.
        images: images a step, shared out over its prompts.
        counts: image counts of a prompt; one is drawn for each step.
        lr: peak learning rate of the language model (the first stage has none).
        vision_lr: peak learning rate of the vision tower; 0 freezes it.
        large: probability of a page of 128 instead of 64 vision tokens.
        cross: probability that a question needs several images.
        little: probability of a page of few vision tokens.
        transcripts: probability that a prompt asks for everything on one of its images.
    """

    name: str
    steps: int
    images: int
    counts: tuple[int, ...]
    lr: float
    vision_lr: float
    large: float
    cross: float = 0.35
    little: float = 0.0
    transcripts: float = 0.0


STAGES = (
    Stage("see", 600, 24, (), 0.0, 1.2e-3, 0.2),
    Stage("spell", 400, 40, (1,), 1.2e-3, 0.0, 0.0, little=1.0, transcripts=1.0),
    Stage("read", 1000, 16, (1, 1, 2), 1.2e-3, 1e-4, 0.1, little=0.3, transcripts=0.7),
    Stage("compare", 2000, 16, (1, 2, 3, 4, 6, 8), 1.2e-3, 1e-4, 0.35, 0.4, little=0.1, transcripts=0.25),
)


def pages(stage: Stage, step: int) -> list[Scene]:
    """The pictures of one step of the first stage: a quarter of them pages of text."""
    rng = split_rng("train", step, stage.name)
    return [text_page(rng) if i % 4 == 3 else draw_scene(rng, None, stage.large) for i in range(stage.images)]


def prompts(stage: Stage, step: int) -> list[Prompt]:
    """The prompts of one step: all with the same number of images, ten questions and more each."""
    rng: random.Random = split_rng("train", step, stage.name)
    count = rng.choice(stage.counts)
    made = []
    for _ in range(max(1, stage.images // count)):
        prompt = draw_prompt(rng, count, 10 + 2 * count, stage.large, stage.cross, stage.little)
        made.append(with_transcript(prompt, rng) if rng.random() < stage.transcripts else prompt)
    return made
