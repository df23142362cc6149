"""Calibration keys, cached: what an MLP that rebuilds keys is trained on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from capsight.errors import CalibrationError
from capsight.kvcapsule.calibration.fit import prefilled_blocks
from capsight.kvcapsule.calibration.processes import Processes
from capsight.kvcapsule.calibration.queries import recorded_queries
from capsight.kvcapsule.calibration.samples import calibration_inputs
from capsight.layout import build_layout

BLOCKS = 6
"""Blocks that are cached of one calibration sample, at most; they lie evenly over it."""


@dataclass(frozen=True, slots=True, eq=False)
class KeySamples:
    """Keys of one layer's calibration blocks, and what queries look for in them.

    Attributes:
        keys: `[M, H, N, D]`, after RoPE, in the model's dtype.
        sample: int64 `[M]`, number of the calibration sample that a block is of.
        queries: float32 `[H, D, D]`, second moment of the queries of every KV head.
    """

    keys: Tensor
    sample: Tensor
    queries: Tensor


def collect_keys(
    model: Any,
    processor: Any,
    samples: Iterable[Any],
    block_size: int,
    progress: bool,
    processes: Processes | None = None,
) -> dict[int, KeySamples]:
    """Prefill every sample once; cache some of its key blocks and add up its query moments.

    Queries are those of the tokens after the last image of a row, or of its last token.

    Args:
        model: a transformers vision-language model; put into eval mode while it runs.
        processor: renders samples that are chat messages; may be None where there are none.
        samples: processor outputs or lists of chat messages.
        block_size: tokens in a block (N).
        progress: show a progress bar.
        processes: those that share the samples; None if this one reads all of them.

    Returns:
        By index, the full-attention layers.

    Raises:
        CalibrationError: fewer than two samples have an image as long as a block.
    """
    processes = processes or Processes.alone()
    local: dict[int, dict[int, tuple[Tensor, Tensor]]] = {}  # by sample and layer: keys, query moment
    for index, inputs in calibration_inputs(model, processor, samples, progress, processes):
        with recorded_queries(model) as queries:
            by_layer = prefilled_blocks(model, inputs, block_size)
        if not by_layer:
            continue
        firsts = first_questions(inputs, model)
        local[index] = {
            layer: (
                blocks[spread(len(blocks))].cpu(),
                query_moment(queries[layer], firsts, blocks.shape[1]).cpu(),
            )
            for layer, (blocks, _) in by_layer.items()
        }
    seen = sorted(entry for part in processes.gathered(local) for entry in part.items())
    if len(seen) < 2:
        raise CalibrationError(
            f"an MLP for keys needs two calibration samples or more with images of {block_size} tokens or "
            "more; add samples, or use codec='static'"
        )
    which = torch.tensor([index for index, layers in seen for _ in next(iter(layers.values()))[0]])
    result = {}
    for layer in sorted(seen[0][1]):
        keys, moments = zip(*(layers[layer] for _, layers in seen), strict=True)
        result[layer] = KeySamples(torch.cat(keys), which, torch.stack(moments).mean(0))
    return result


def first_questions(inputs: Mapping[str, Any], model: Any) -> list[int]:
    """Where, row by row, the tokens after the last image begin; of a row without such, its last token."""
    layout = build_layout(inputs, model.config)
    return [min(row.last_vision_end, row.length - 1) for row in layout.rows]


def query_moment(queries: Tensor, firsts: list[int], heads: int) -> Tensor:
    """Mean of q q^T over the last tokens of all rows and the query heads of a group.

    Args:
        queries: `[B, Hq, S, D]`.
        firsts: for each row, the first token that counts.
        heads: KV heads (H).

    Returns:
        float32 `[H, D, D]`.
    """
    grouped = queries.float().unflatten(1, (heads, -1))  # [B, H, G, S, D]
    taken = torch.cat(
        [row[:, :, first:].flatten(1, 2) for row, first in zip(grouped, firsts, strict=True)], 1
    )
    return taken.mT @ taken / taken.shape[1]


def spread(count: int, most: int = BLOCKS) -> Tensor:
    """At most `most` of `count` places, evenly spread and ascending: int64."""
    return torch.linspace(0, count - 1, min(count, most)).round().long()
