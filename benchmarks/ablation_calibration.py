"""One pass over calibration prompts: all that the ablations are fitted from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from ablation_places import Arrangement, places
from torch import Tensor
from transformers import DynamicCache

from capsight.baselines.seen import Seen
from capsight.kvcapsule.calibration.key_samples import KeySamples, first_questions, query_moment, spread
from capsight.kvcapsule.calibration.queries import recorded_queries
from capsight.kvcapsule.codecs.moments import LayerMoments
from capsight.kvcapsule.plan import CapsulePlan
from capsight.layout import PromptLayout, build_layout


@dataclass(frozen=True, slots=True, eq=False)
class Blocks:
    """The image blocks of one prompt.

    Attributes:
        layout: of the prompt.
        plan: its runs.
        keys, values: `[M, H, N, D]` of each layer; keys are after RoPE.
        queries: float32 `[H, D, D]` of each layer, second moment of the queries after the images.
        attention: float32 `[N]` of each layer, mean attention of these queries to each position of a block.
    """

    layout: PromptLayout
    plan: CapsulePlan
    keys: list[Tensor]
    values: list[Tensor]
    queries: list[Tensor]
    attention: list[Tensor]

    @classmethod
    @torch.no_grad()
    def prefilled(cls, model: Any, inputs: Mapping[str, Any], block_size: int) -> Blocks:
        """Prefill a prompt (processor outputs) and look at every layer.

        Args:
            model: a model all of whose layers have full attention.
            inputs: the prompt.
            block_size: tokens in a block (N).
        """
        layout = build_layout(inputs, model.config)
        plan = CapsulePlan.from_layout(layout, block_size)
        cache, firsts = DynamicCache(config=model.config), first_questions(inputs, model)
        with recorded_queries(model) as seen:
            model.generate(**inputs, past_key_values=cache, max_new_tokens=1, do_sample=False)
        found = cls(layout, plan, [], [], [], [])
        layers: list[Any] = cache.layers
        for index, layer in enumerate(layers):
            heads, head_dim = layer.keys.shape[1], layer.keys.shape[3]
            found.keys.append(_runs(layer.keys, plan))
            found.values.append(_runs(layer.values, plan))
            found.queries.append(query_moment(seen[index], firsts, heads))
            mean = Seen(seen[index], layer.keys, None, head_dim**-0.5, plan.pads).mean(firsts)  # [B, H, S]
            found.attention.append(_runs(mean[..., None], plan).mean((0, 1, 3)))
        return found

    def all(self) -> tuple[list[Tensor], list[Tensor]]:
        """Keys and values of all layers."""
        return self.keys, self.values


def _runs(x: Tensor, plan: CapsulePlan) -> Tensor:
    """The runs in `[B, H, S, D]`: `[M, H, N, D]`."""
    return torch.stack([x[run.row, :, run.start : run.end] for run in plan.runs])


@dataclass
class Calibration:
    """What was seen of all prompts, layer by layer.

    Attributes:
        arrangements: name -> arrangement, None for blocks as they are.
        moments: for each arrangement, second moments of every layer.
        keys, values: samples of every layer for MLPs, as they are.
        attention: float32 `[N]` of every layer.
        prompts, blocks: how many were seen.
        outputs: float32 `[H, D, D]` of every layer, what `ablation_metrics.output_moments` gives.
    """

    arrangements: dict[str, Arrangement | None]
    outputs: list[Tensor]
    moments: dict[str, list[LayerMoments]] = field(default_factory=dict)
    keys: list[KeySamples] = field(default_factory=list)
    values: list[KeySamples] = field(default_factory=list)
    attention: list[Tensor] = field(default_factory=list)
    prompts: int = 0
    blocks: int = 0


def calibrate(
    prompts: Iterable[Blocks], arrangements: dict[str, Arrangement | None], outputs: list[Tensor]
) -> Calibration:
    """Add up what the blocks of calibration prompts say."""
    found, sampled = Calibration(arrangements, outputs), list[dict[str, list[Tensor]]]()
    number: list[int] = []
    for index, blocks in enumerate(prompts):
        chosen = spread(len(blocks.plan.runs))
        number += [index] * len(chosen)
        sampled.append(
            {"keys": [x[chosen] for x in blocks.keys], "values": [x[chosen] for x in blocks.values]}
        )
        sampled[-1] |= {"queries": blocks.queries, "attention": blocks.attention}
        at = places(blocks.layout, blocks.plan.block_size)
        place = torch.tensor([at[run] for run in blocks.plan.runs])
        for name, arrangement in arrangements.items():
            for layer, (keys, values) in enumerate(zip(*blocks.all(), strict=True)):
                if arrangement is not None:
                    keys, values = arrangement.there(keys, values, place)
                if len(sums := found.moments.setdefault(name, [])) == layer:
                    sums.append(LayerMoments(*keys.shape[1:]))
                sums[layer].update(keys, values)
        found.prompts, found.blocks = found.prompts + 1, found.blocks + len(place)
    which = torch.tensor(number)

    def joined(kind: str, layer: int, join: Callable[[list[Tensor]], Tensor]) -> Tensor:
        return join([prompt[kind][layer] for prompt in sampled])

    for layer in range(len(next(iter(found.moments.values())))):
        queries = joined("queries", layer, torch.stack).mean(0)
        equal = torch.eye(queries.shape[-1]).expand_as(queries)  # no query looks for values
        found.keys.append(KeySamples(joined("keys", layer, torch.cat), which, queries))
        found.values.append(KeySamples(joined("values", layer, torch.cat), which, equal))
        found.attention.append(joined("attention", layer, torch.stack).mean(0))
    return found
