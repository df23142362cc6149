"""The stages of a judge's training, and the prompts of their steps."""

import random
from dataclasses import dataclass

from judging.prompts import Prompt, draw_prompt, split_rng
from judging.question import Question
from judging.questions import KINDS, describe
from judging.shapes import Judge


@dataclass(frozen=True, slots=True)
class Stage:
    """A stage of training.

    Attributes:
        pictures: of one step.
        steps: how many.
        first: learning rate at the start.
        last: learning rate at the end.
        counts: pictures of a prompt, drawn anew for each step; none: the tower learns alone.
    """

    pictures: int
    steps: int
    first: float
    last: float
    counts: tuple[int, ...] = ()

    def rate(self, step: int) -> float:
        """The learning rate of a step: it rises for 30 steps, then changes evenly."""
        return min(1.0, (step + 1) / 30) * (self.first + (self.last - self.first) * step / self.steps)


@dataclass(frozen=True, slots=True)
class Plan:
    """How a judge is trained.

    Attributes:
        stages: by name, in order.
        questions: of a prompt of so many pictures, the descriptions apart.
        often: how often kinds are asked; the others once.
    """

    stages: dict[str, Stage]
    questions: dict[int, int]
    often: dict[str, int]


_USUAL = Plan(
    {
        "see": Stage(24, 400, 1.5e-3, 1e-4),
        "read": Stage(16, 400, 1.2e-3, 1.2e-3, (1, 1, 2)),
        "compare": Stage(16, 1000, 1.2e-3, 1e-5, (1, 2, 2, 4, 4)),
        "finish": Stage(16, 1200, 1e-3, 1e-5, (1, 2, 4, 4)),
    },
    {1: 12, 2: 16, 4: 24},
    {
        "number": 3, "at": 5, "where": 3, "differ": 5, "odd": 5,
        "count": 2, "same_ground": 3, "which_scene": 6, "which": 2,
    },
)  # fmt: skip
#: A judge with many vision tokens learns from fewer pictures a step, and is asked more of each.
_OWN = {
    "wide": Plan(
        {
            "see": Stage(16, 850, 1.5e-3, 1e-4),
            "read": Stage(8, 250, 1.2e-3, 1.2e-3, (1, 1, 2)),
            "compare": Stage(8, 470, 1.2e-3, 1e-5, (1, 2, 2, 2, 4)),
        },
        {1: 20, 2: 28, 4: 40},
        {
            "number": 3, "at": 4, "where": 3, "differ": 0, "odd": 0,
            "count": 2, "same_ground": 2, "which_scene": 3, "which": 2,
        },
    )
}  # fmt: skip


def plan_of(judge: Judge) -> Plan:
    """How a judge is trained."""
    return _OWN.get(judge.name, _USUAL)


def stage_prompts(judge: Judge, stage: str, step: int) -> list[Prompt]:
    """The prompts of one step."""
    plan = plan_of(judge)
    now = plan.stages[stage]
    rng = split_rng(judge.name, "train", step, stage)
    if not now.counts:
        return [draw_prompt(rng, judge.grid, judge.style, 1, 0) for _ in range(now.pictures)]
    count = rng.choice(now.counts)
    kinds = tuple(k for k in KINDS if k != "describe" for _ in range(plan.often.get(k, 1)))
    prompts = []
    for _ in range(now.pictures // count):
        one = draw_prompt(rng, judge.grid, judge.style, count, plan.questions[count], kinds)
        long = [draw_long(one, rng, k) for k in rng.sample(range(count), min(count, 2))]
        prompts.append(Prompt(one.scenes, (*one.questions, *long)))
    return prompts


def draw_long(prompt: Prompt, rng: random.Random, k: int) -> Question:
    """The question for a description of picture `k`."""
    q = describe(prompt.scenes[k].world, k, rng)
    return Question(q.task, f"picture {k + 1}: {q.text}", q.answer, q.pieces)
