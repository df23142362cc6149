"""Attention over ragged pieces of tokens in plain torch, piece by piece: the reference of the native code."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from capsight.kvcapsule.attention.native.source import Source


def plain_attention(query: Tensor, sources: Sequence[Source], scaling: float) -> tuple[Tensor, Tensor]:
    """See `decode_attention`; sums are float64."""
    batch, heads = sources[0].starts.shape
    q = query.double().reshape(batch, heads, -1, query.shape[3])  # [B, H, C, D]
    out, lse = torch.zeros_like(q), q.new_full(q.shape[:3], -torch.inf)
    for row in range(batch):
        for head in range(heads):
            queries = q[row, head]
            pairs = [_piece(source, row, head, q.shape[3]) for source in sources]
            keys, values = (torch.cat(x) for x in zip(*pairs, strict=True))
            bias = torch.cat([_bias(source, row, head, len(queries)) for source in sources], 1)
            scores = scaling * queries @ keys.T + bias  # [C, n]
            if len(keys):
                lse[row, head] = scores.logsumexp(1)
                seen = lse[row, head, :, None] > -torch.inf
                out[row, head] = torch.where(seen, scores.softmax(1), 0) @ values
    return out.view(query.shape).to(query.dtype), lse.view(query.shape[:3]).float()


def _piece(source: Source, row: int, head: int, channels: int) -> tuple[Tensor, Tensor]:
    """Keys and values `[n, D]` of a piece."""
    start, count, steps = int(source.starts[row, head]), int(source.counts[row, head]), source.steps

    def mine(x: Tensor) -> Tensor:
        return x[start : start + count, head if x.shape[1] > 1 else 0]

    keys, values = mine(source.keys), mine(source.values)
    if steps is None:
        return keys.double(), values.double()
    if steps.bits == 4:
        keys, values = (torch.cat([x & 15, x >> 4], 1)[:, :channels] for x in (keys, values))
    keys, values = keys.double(), values * mine(steps.value_step)[:, None].double()
    values = values + mine(steps.value_low)[:, None]
    if steps.key_step is not None:
        keys = keys * mine(steps.key_step)[:, None]
    if steps.key_low is not None:
        keys = keys + mine(steps.key_low)[:, None]
    group = torch.arange(start, start + count) // steps.group if steps.group else torch.zeros(count).long()
    if steps.size is not None:
        keys = keys * steps.size[group, head]
    if steps.mean is not None:
        keys = keys + steps.mean[group, head]
    return keys, values


def _bias(source: Source, row: int, head: int, queries: int) -> Tensor:
    """What is added to the scores of a piece: `[C, n]`."""
    count = int(source.counts[row, head])
    if source.bias is None or source.bias_starts is None:
        return torch.zeros(queries, count, dtype=torch.float64)
    first = source.bias_starts[row, head] + torch.arange(queries)[:, None] * source.bias_stride
    return source.bias.flatten()[first + torch.arange(count)].double()
