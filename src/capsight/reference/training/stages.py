"""The lessons: see (dense labels), spell (a snippet), index (several), compare (one to eight pages)."""

import random
from dataclasses import dataclass

from capsight.reference.drawing import draw_scene
from capsight.reference.drawing.scene import Scene
from capsight.reference.prompts import Prompt, ask_about, draw_prompt, split_rng
from capsight.reference.training.dense import text_page
from capsight.reference.training.snippets import snippet


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
        snippets: probability that a prompt is about snippets instead of pages.
    """

    name: str
    steps: int
    images: int
    counts: tuple[int, ...]
    lr: float
    vision_lr: float
    large: float
    cross: float = 0.35
    snippets: float = 0.0


STAGES = (
    Stage("see", 850, 32, (), 0.0, 1.2e-3, 0.2),
    Stage("spell", 400, 64, (1,), 1.2e-3, 0.0, 0.0, snippets=1.0),
    Stage("index", 360, 64, (1, 1, 1, 2, 4), 1.2e-3, 0.0, 0.0, snippets=1.0),
    Stage("compare", 1000, 24, (1, 2, 3, 4, 6, 8), 1.2e-3, 1.5e-4, 0.4, snippets=0.25),
)


def pages(stage: Stage, step: int) -> list[Scene]:
    """The pictures of one step of the first stage: half of them pages of text."""
    rng = split_rng("train", step, stage.name)
    return [text_page(rng) if i % 2 else draw_scene(rng, None, stage.large) for i in range(stage.images)]


def prompts(stage: Stage, step: int) -> list[Prompt]:
    """The prompts of one step: all with the same number of images, ten questions and more each."""
    rng: random.Random = split_rng("train", step, stage.name)
    count = rng.choice(stage.counts)
    made = []
    for _ in range(max(1, stage.images // count)):
        if rng.random() < stage.snippets:
            scenes = [snippet(rng) for _ in range(count)]
            made.append(ask_about(rng, scenes, 3 + 2 * count, stage.cross))
        else:
            made.append(draw_prompt(rng, count, 10 + count // 2, stage.large, stage.cross))
    return made
