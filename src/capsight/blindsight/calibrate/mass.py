"""Where the attention of image rows goes, summed up in chunks of queries."""

from __future__ import annotations

import torch
from torch import Tensor

from capsight.blindsight.calibrate.capture import LayerCall
from capsight.blindsight.categories import SPARSE, Category, MaskOptions
from capsight.blindsight.masks import TokenTable, token_table
from capsight.blindsight.spans import Intervals, intervals, whole
from capsight.layout import PromptLayout, RowLayout

TEXT, SINKS, NEAR, FAR, OTHER = range(5)
"""Bins: text; sinks of other images; own sinks and window; the rest of the own image; other images."""

SCORES_AT_ONCE = 1 << 24
"""Attention scores held at any time; the chunk of queries follows from it."""


def attention_mass(call: LayerCall, layout: PromptLayout, options: MaskOptions) -> Tensor:
    """Mean attention probability that the rows of later images put on each bin.

    Args:
        call: of one layer; queries and keys of whole prompts.
        layout: of the batch; the first image of each row is not counted.
        options: which tokens are sinks, and the window.

    Returns:
        float32 `[Hq, 5]`; each row sums to 1, or is NaN if no row has two images.
    """
    total = call.query.new_zeros(call.query.shape[1], 5, dtype=torch.float32)
    count = 0
    for index, row in enumerate(layout.rows):
        found = intervals(row, Category.DENSE, options, call.rule, whole(row))
        table = token_table(row, options)
        step = max(1, SCORES_AT_ONCE // (call.query.shape[1] * row.length))
        for block in (block for block in row.blocks if block.image > 0):
            for start in range(block.start, block.end, step):
                rows = torch.arange(start, min(start + step, block.end))
                total += _chunk(call, index, rows, found, _bins(row, table, block.image, rows, options))
                count += len(rows)
    return total / count if count else total + torch.nan


def missing_mass(mass: Tensor) -> Tensor:
    """What each sparse category cuts off of `[Hq, 5]`: `[3, Hq]`, in the order of `SPARSE`."""
    lost = {
        Category.SINK: mass[:, FAR] + mass[:, OTHER],
        Category.INTRA_IMAGE: mass[:, SINKS] + mass[:, OTHER],
        Category.INTRA_IMAGE_SINK: mass[:, OTHER],
    }
    return torch.stack([lost[category] for category in SPARSE])


def _bins(row: RowLayout, table: TokenTable, image: int, rows: Tensor, options: MaskOptions) -> Tensor:
    """The bin of every key for queries `rows` of one image: int64 `[n, S]`."""
    own = table.image == image  # [S]
    bins = torch.where(own, FAR, torch.where(table.is_sink, SINKS, OTHER))
    bins = torch.where(table.image < 0, TEXT, bins)  # [S]
    distance = (rows[:, None] - torch.arange(row.length)).abs()  # [n, S]
    return torch.where(own & (table.is_sink | (distance < options.own_window)), NEAR, bins)


def _chunk(call: LayerCall, index: int, rows: Tensor, found: Intervals, bins: Tensor) -> Tensor:
    """Summed probabilities of some queries of prompt `index` by bin: float32 `[Hq, 5]`."""
    device = call.query.device
    key = call.key[index].float()  # [Hkv, S, D]
    query = call.query[index].index_select(1, rows.to(device)).float()  # [Hq, n, D]
    hq, n, d = query.shape
    scores = (query.view(key.shape[0], -1, d) @ key.mT).view(hq, n, -1) * call.scaling  # [Hq, n, S]
    seen = found.seen(rows, torch.arange(key.shape[1]))  # [n, S]
    probability = scores.masked_fill_(~seen.to(device), -torch.inf).softmax(-1)
    bins = bins.to(device)
    return torch.stack([(probability * (bins == b)).sum((1, 2)) for b in range(5)], 1)
