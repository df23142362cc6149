"""The stages of a judge's training, and the prompts of their steps."""

import random

from judging.prompts import Prompt, draw_prompt, split_rng
from judging.questions import KINDS, Question, describe
from judging.shapes import Judge

Stages = dict[str, tuple[int, int, float, float, tuple[int, ...]]]

#: Pictures and steps of a stage, its learning rate at the start and at the end, (pictures of a prompt, ...).
STAGES: Stages = {
    "see": (24, 400, 1.5e-3, 1e-4, ()),
    "read": (16, 400, 1.2e-3, 1.2e-3, (1, 1, 2)),
    "compare": (16, 1000, 1.2e-3, 1e-5, (1, 2, 2, 4, 4)),
    "finish": (16, 1200, 1e-3, 1e-5, (1, 2, 4, 4)),
}
#: A judge with many vision tokens learns from fewer pictures a step, and is asked more of each.
_WIDE: Stages = {
    "see": (16, 1000, 1.5e-3, 1e-4, ()),
    "read": (8, 600, 1.2e-3, 1.2e-3, (1, 1, 2)),
    "compare": (8, 1400, 1.2e-3, 1e-5, (1, 2, 2, 4)),
}
#: How often kinds are asked that are learnt late; the others once.
_OFTEN = {
    "number": 3, "at": 5, "where": 3, "differ": 5, "odd": 5,
    "count": 2, "same_ground": 3, "which_scene": 6, "which": 2,
}  # fmt: skip


def stages_of(judge: Judge) -> Stages:
    """The stages of a judge."""
    return STAGES if judge.side == 1 else _WIDE


def stage_prompts(judge: Judge, stage: str, step: int) -> list[Prompt]:
    """The prompts of one step."""
    pictures, _, _, _, counts = stages_of(judge)[stage]
    rng = split_rng(judge.name, "train", step, stage)
    if not counts:
        return [draw_prompt(rng, judge.grid, judge.style, 1, 0) for _ in range(pictures)]
    count = rng.choice(counts)
    questions = {1: 12, 2: 16, 4: 24}[count]
    if judge.side > 1:
        questions = questions * 5 // 3
    kinds = tuple(k for k in KINDS if k != "describe" for _ in range(_OFTEN.get(k, 1)))
    prompts = []
    for _ in range(pictures // count):
        one = draw_prompt(rng, judge.grid, judge.style, count, questions, kinds)
        long = [draw_long(one, rng, k) for k in rng.sample(range(count), min(count, 2))]
        prompts.append(Prompt(one.scenes, (*one.questions, *long)))
    return prompts


def draw_long(prompt: Prompt, rng: random.Random, k: int) -> Question:
    """The question for a description of picture `k`."""
    q = describe(prompt.scenes[k].world, k, rng)
    return Question(q.task, f"picture {k + 1}: {q.text}", q.answer, q.pieces)
