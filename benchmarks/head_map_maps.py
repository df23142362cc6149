"""The head maps that `head_map_curve.py` tests, made from what the criteria say of a few prompts."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from head_map_scoring import Score, Scored
from rich.progress import track

from capsight.blindsight import SPARSE, Category, HeadMap, MaskOptions, Prompt, Thresholds, visible_pairs
from capsight.blindsight.calibrate import CRITERIA, Losses, at_cost
from capsight.blindsight.calibrate.capture import shape_of
from capsight.blindsight.calibrate.recovery import loosest, recover
from capsight.blindsight.calibrate.run import ALPHAS
from capsight.blindsight.calibrate.votes import Votes
from capsight.layout import PromptLayout

RANDOM_SEEDS = (0, 1, 2)


@dataclass
class Row:
    """One head map."""

    group: str
    name: str
    head_map: HeadMap
    facts: dict[str, Any]


@cache
def pairs(layout: PromptLayout, category: Category, options: MaskOptions) -> int:
    """Visible pairs of one head, remembered."""
    return visible_pairs(layout, category, options)


def cost(layouts: Sequence[PromptLayout], head_map: HeadMap) -> int:
    """Pairs of query and key that all heads compute for these prompts: attention FLOPs over 4 D."""
    return sum(
        heads * pairs(layout, category, head_map.options)
        for category, heads in head_map.counts().items()
        if heads
        for layout in layouts
    )


def saved(layouts: Sequence[PromptLayout], head_map: HeadMap) -> float:
    """Fraction of attention FLOPs saved (0..1)."""
    dense = HeadMap.all_dense(head_map.num_layers, head_map.num_heads)
    return 1 - cost(layouts, head_map) / cost(layouts, dense)


class Calibration:
    """What each criterion says of each head, prompt by prompt, so that every map is made from it at once."""

    def __init__(
        self, model: Any, voting: Sequence[Prompt], options: MaskOptions, names: Sequence[str]
    ) -> None:
        """Judge the heads; `seconds` says how long each criterion took."""
        self.size, self.options = shape_of(model), options
        self.layouts = [prompt.layout for prompt in voting]
        self.lost: dict[str, list[torch.Tensor]] = {}
        self.seconds: dict[str, float] = {}
        for name in names:
            began = time.perf_counter()
            told = track(voting, f"judging heads by {name}", transient=True)
            self.lost[name] = [CRITERIA[name](model, prompt, options, 1) for prompt in told]
            self.seconds[name] = time.perf_counter() - began

    def losses(self, name: str) -> Losses:
        """Means over prompts."""
        losses = Losses(*self.size)
        for lost in self.lost[name]:
            losses.add(lost)
        return losses

    def votes(self, name: str) -> Votes:
        """As `calibrate` counts them."""
        votes = Votes(*self.size)
        for lost in self.lost[name]:
            votes.add(lost)
        return votes

    def at_share(self, name: str, share: float) -> HeadMap:
        """The map of this criterion that saves so large a share of what can be saved."""
        sink = HeadMap.uniform(Category.SINK, *self.size, self.options)
        dense = HeadMap.all_dense(*self.size)
        most = cost(self.layouts, dense) - share * (cost(self.layouts, dense) - cost(self.layouts, sink))
        return at_cost(self.losses(name).mean(), lambda m: cost(self.layouts, m), most, self.options)


def drop_of(held: Sequence[Scored], head_map: HeadMap) -> float:
    """Share of held-out answers that change."""
    total = sum((prompt.score(head_map) for prompt in held), Score())
    return 1 - total.agrees / total.questions


def rows_of(
    calibration: Calibration, held: Sequence[Scored], shares: Sequence[float], tolerances: Sequence[float]
) -> list[Row]:
    """Every map there is to test."""
    size, options = calibration.size, calibration.options
    rows = [Row("dense", "all dense", HeadMap.all_dense(*size), {})]
    rows += [Row("control", f"all {c}", HeadMap.uniform(c, *size, options), {}) for c in SPARSE]
    for share in shares:
        for name in calibration.lost:
            found = calibration.at_share(name, share)
            rows.append(Row("equal FLOPs", name, found, {"share": share}))
        counts = calibration.at_share("output", share).counts()
        for seed in RANDOM_SEEDS:
            drawn = HeadMap.random(*size, counts, seed, options)
            rows.append(Row("equal FLOPs", f"random {seed}", drawn, {"share": share}))
    errors = calibration.losses("output")
    tasks = [(name, tolerance) for name in calibration.lost for tolerance in tolerances]
    for name, tolerance in track(tasks, "tolerances", transient=True):
        votes, given = calibration.votes(name), Thresholds((ALPHAS[name],) * 2, 0.1, 0.9, 0.9)

        def changed(head_map: HeadMap) -> float:
            return drop_of(held, head_map)

        free, drop, thresholds = loosest(votes, given, options, changed, tolerance)
        facts = {"tolerance": tolerance, "held_out_changed": drop, "alpha": thresholds.alpha[0]}
        rows.append(Row("tolerance", name, free, facts))
        voted = HeadMap(votes.decide(given), options)
        bound, drop = recover(voted, errors, changed, tolerance)
        facts = {"tolerance": tolerance, "held_out_changed": drop, "alpha": ALPHAS[name]}
        rows.append(Row("recovery", f"{name}, alpha {ALPHAS[name]:g}", bound, facts))
    return rows
