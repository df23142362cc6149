"""The sides of the demo: each is asked the same questions, and all take turns at being timed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from capsight.blindsight import HeadMap, PrefillFlops, prefill_flops
from capsight.evaluation import Answers, Item, ask_item
from capsight.evaluation.asking import process
from capsight.evaluation.cache_bytes import CacheBytes
from capsight.evaluation.timing import Timing, summary, time_together
from capsight.kvcapsule import KVCapsule
from capsight.layout import build_layout
from capsight.runtime import Decode, enable

ROUNDS = 8
"""Generations of every side that count, after one that warms up."""


@dataclass(frozen=True, slots=True, eq=False)
class Asked:
    """What a side is made of.

    Attributes:
        name: heading of its column.
        capsule: None is the full cache.
        head_map: that prefill follows, if any.
        decodes: how attention gets at capsules: the first way answers, all are timed.
    """

    name: str
    capsule: KVCapsule | None = None
    head_map: HeadMap | None = None
    decodes: tuple[Decode, ...] = ("materialise",)


@dataclass(frozen=True, slots=True)
class OtherDecode:
    """The way to decode that does not answer.

    Attributes:
        decode: its name.
        kv_bytes: of the cache after the images; capsules may be stored in another way for it.
        timing: time to first token and decode speed.
        ratios: of both to the full cache, see `Side`.
    """

    decode: Decode
    kv_bytes: int
    timing: Timing
    ratios: Timing

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return {"kv_bytes": self.kv_bytes} | times(self.timing, self.ratios)


@dataclass(frozen=True, slots=True)
class Side:
    """One side of the comparison.

    Attributes:
        name: heading of its column.
        answers: in the order of the questions.
        timing: time to first token and decode speed.
        ratios: of both to those of the full cache, the medians over all rounds and turns.
        module_nbytes: of the capsule, if it has one.
        flops: of the language model's prefill.
        other: a second way to decode, where it was timed.
    """

    name: str
    answers: Answers
    timing: Timing
    ratios: Timing
    module_nbytes: int
    flops: PrefillFlops
    other: OtherDecode | None = None


@torch.no_grad()
def ask_sides(
    model: Any, processor: Any, item: Item, asked: Sequence[Asked], on_step: Callable[[str], None]
) -> list[Side]:
    """Ask every side all questions (protocol `after`), then time all sides and ways to decode in turns.

    Args:
        model: the model.
        processor: its processor.
        item: images and questions.
        asked: the sides.
        on_step: told what is being done.
    """
    answers = []
    for side in asked:
        on_step(f"asking: {side.name}")
        with _enabled(model, side, side.decodes[0]) as fast:
            answers.append(ask_item(fast, processor, item, "after"))
    inputs = process(processor, item, [item.asks[0].question])
    on_step("timing all of them in turns")
    timed = [(side, decode) for side in asked for decode in side.decodes]
    full, *_ = found = time_together([partial(_enabled, model, *key) for key in timed], inputs, ROUNDS)
    timings = {key: summary(rounds, full) for key, rounds in zip(timed, found, strict=True)}
    layout, text = build_layout(inputs, model.config), model.config.get_text_config()
    dense = HeadMap.all_dense(text.num_hidden_layers, text.num_attention_heads)
    sides = []
    for side, said in zip(asked, answers, strict=True):
        first, *rest = ((decode, timings[side, decode]) for decode in side.decodes)
        others = [OtherDecode(way, _nbytes(model, inputs, side, way), *timing) for way, timing in rest]
        modules = 0 if side.capsule is None else side.capsule.module_nbytes
        flops = prefill_flops(model, layout, side.head_map or dense)
        sides.append(Side(side.name, said, *first[1], modules, flops, next(iter(others), None)))
    return sides


def times(timing: Timing, ratios: Timing) -> dict[str, float]:
    """What JSON says of them."""
    return {
        "ttft_s": timing.ttft_s,
        "tokens_per_s": timing.tokens_per_s,
        "ttft_ratio": ratios.ttft_s,
        "speed_ratio": ratios.tokens_per_s,
    }


def _enabled(model: Any, side: Asked, decode: Decode) -> Any:
    """A side's head map is followed though the demo's prompts are short: its answers are to be seen."""
    return enable(model, capsule=side.capsule, head_map=side.head_map, decode=decode, prefill="sparse")


def _nbytes(model: Any, inputs: dict[str, Any], side: Asked, decode: Decode) -> int:
    with _enabled(model, side, decode) as fast:
        return CacheBytes.of(fast.encapsulate(**inputs)).kv
