"""Calibration keys, cached: what an MLP that rebuilds keys is trained on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from capsight.errors import CalibrationError
from capsight.kvcapsule.calibration.fit import calibration_inputs, prefilled_blocks
from capsight.kvcapsule.calibration.queries import recorded_queries
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
    model: Any, processor: Any, samples: Iterable[Any], block_size: int, progress: bool
) -> dict[int, KeySamples]:
    """Prefill every sample once; cache some of its key blocks and add up its query moments.

    Queries are those of the tokens after the last image of a row, or of its last token.

    Args:
        model: a transformers vision-language model; put into eval mode while it runs.
        processor: renders samples that are chat messages; may be None where there are none.
        samples: processor outputs or lists of chat messages.
        block_size: tokens in a block (N).
        progress: show a progress bar.

    Returns:
        By index, the full-attention layers.

    Raises:
        CalibrationError: fewer than two samples have an image as long as a block.
    """
    keys: dict[int, list[Tensor]] = {}
    moments: dict[int, list[Tensor]] = {}
    number: list[int] = []
    for index, inputs in enumerate(calibration_inputs(model, processor, samples, progress)):
        with recorded_queries(model) as queries:
            found = prefilled_blocks(model, inputs, block_size)
        if not found:
            continue
        firsts = first_questions(inputs, model)
        for layer, (blocks, _) in found.items():
            chosen = spread(len(blocks))
            keys.setdefault(layer, []).append(blocks[chosen].cpu())
            moments.setdefault(layer, []).append(query_moment(queries[layer], firsts, blocks.shape[1]).cpu())
        number += [index] * len(chosen)
    if len(set(number)) < 2:
        raise CalibrationError(
            f"an MLP for keys needs two calibration samples or more with images of {block_size} tokens or "
            "more; add samples, or use codec='static'"
        )
    which = torch.tensor(number)
    return {
        layer: KeySamples(torch.cat(keys[layer]), which, torch.stack(moments[layer]).mean(0))
        for layer in sorted(keys)
    }


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
