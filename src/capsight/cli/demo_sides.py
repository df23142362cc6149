"""The sides of the demo: each is asked the same questions, and all take turns at being timed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from capsight.blindsight import HeadMap, PrefillFlops, prefill_flops
from capsight.evaluation import Answers, Item, ask_item
from capsight.evaluation.asking import process
from capsight.evaluation.stock import compiled, why_not_compiled
from capsight.evaluation.timing import NEW, Generates, Round, Timing, summary, time_together
from capsight.kvcapsule import KVCapsule
from capsight.layout import build_layout
from capsight.runtime import Decode, enable

ROUNDS = 8
"""Generations of every side that count, after one that warms up."""

_log = logging.getLogger("capsight")


@dataclass(frozen=True, slots=True, eq=False)
class Asked:
    """What a side is made of.

    Attributes:
        name: heading of its column.
        capsule: None is the full cache.
        head_map: that prefill follows, if any.
        decode: how attention gets at capsules, if there are any.
    """

    name: str
    capsule: KVCapsule | None = None
    head_map: HeadMap | None = None
    decode: Decode | None = None


@dataclass(frozen=True, slots=True)
class Pace:
    """How fast a side is, with eager steps or with compiled ones.

    Attributes:
        timing: time to first token and decode speed.
        ratios: the first to that of the full cache with eager steps, the other to that of the full cache
            where it decodes fastest; medians over all rounds and turns.
    """

    timing: Timing
    ratios: Timing


@dataclass(frozen=True, slots=True)
class Side:
    """One side of the comparison.

    Attributes:
        name: heading of its column.
        answers: in the order of the questions.
        module_nbytes: of the capsule, if it has one.
        flops: of the language model's prefill.
        eager: steps as transformers runs them; the full cache is a `DynamicCache`.
        compiled: steps in a graph of `torch.compile`, where they can be; the full cache is a `StaticCache`.
    """

    name: str
    answers: Answers
    module_nbytes: int
    flops: PrefillFlops
    eager: Pace
    compiled: Pace | None = None

    @property
    def fastest(self) -> Pace:
        """The steps that take less time."""
        paces = (self.eager,) if self.compiled is None else (self.eager, self.compiled)
        return max(paces, key=lambda pace: pace.timing.tokens_per_s)


@torch.no_grad()
def ask_sides(
    model: Any,
    processor: Any,
    item: Item,
    asked: Sequence[Asked],
    with_compiled: bool,
    on_step: Callable[[str], None],
) -> list[Side]:
    """Ask every side all questions (protocol `after`), then time all sides in turns.

    Args:
        model: the model.
        processor: its processor.
        item: images and questions.
        asked: the sides, the full cache first.
        with_compiled: whether compiled steps are timed besides.
        on_step: told what is being done.
    """
    answers = []
    for side in asked:
        on_step(f"asking: {side.name}")
        with _enabled(model, side) as fast:
            answers.append(ask_item(fast, processor, item, "after"))
    inputs = process(processor, item, [item.asks[0].question])
    every: _Every = {(i, False): partial(_enabled, model, side) for i, side in enumerate(asked)}
    if with_compiled:
        on_step("compiling decode steps (the first time that takes a minute)")
        every |= _graphs(every, asked, inputs)
    on_step("timing all of them in turns")
    rounds = dict(zip(every, time_together([*every.values()], inputs, ROUNDS), strict=True))
    full = rounds[0, False]
    fastest = max(
        (rounds[key] for key in every if not key[0]), key=lambda own: summary(own, full)[0].tokens_per_s
    )

    def pace(own: Sequence[Round]) -> Pace:
        timing, ratios = summary(own, full)
        return Pace(timing, Timing(ratios.ttft_s, summary(own, fastest)[1].tokens_per_s))

    layout, text = build_layout(inputs, model.config), model.config.get_text_config()
    dense = HeadMap.all_dense(text.num_hidden_layers, text.num_attention_heads)
    return [
        Side(
            side.name,
            said,
            0 if side.capsule is None else side.capsule.module_nbytes,
            prefill_flops(model, layout, side.head_map or dense),
            pace(rounds[i, False]),
            pace(rounds[i, True]) if (i, True) in rounds else None,
        )
        for i, (side, said) in enumerate(zip(asked, answers, strict=True))
    ]


_Every = dict[tuple[int, bool], Callable[[], AbstractContextManager[Generates]]]
"""What is timed: which side, and whether its steps are compiled."""


def _graphs(
    eager: Mapping[tuple[int, bool], Any], asked: Sequence[Asked], inputs: Mapping[str, Any]
) -> _Every:
    """All sides that can have compiled steps, which are compiled by then."""
    found: _Every = {}
    for (i, _), enter in eager.items():
        graph = partial(compiled, enter, inputs["input_ids"].shape[1] + NEW)
        with graph() as model:
            reason = why_not_compiled(model, inputs)
        if not reason:
            found[i, True] = graph
            continue
        _log.warning("decode steps of %s are not compiled: %s", asked[i].name, reason)
        if not found:  # nor are those of the others
            break
    return found


def _enabled(model: Any, side: Asked) -> Any:
    """A side's head map is followed though the demo's prompts are short: its answers are to be seen."""
    return enable(model, capsule=side.capsule, head_map=side.head_map, decode=side.decode, prefill="sparse")
