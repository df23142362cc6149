"""Attention over tokens that each KV head keeps for itself: nothing is rebuilt.

What a head keeps of a row is one piece of memory, but pieces differ in length. Each is attended to on its
own, in as many parts as there are threads, the exact tokens of all rows and heads together; parts are then
added up by the logs of their normalisers, as in Flash-Decoding. Only where pieces are many and short are they
copied side by side, since calls would cost more than that.
"""

from __future__ import annotations

import torch
from torch import Tensor

from capsight.kvcapsule.latent.blocks import BlockRows, KeptTokens
from capsight.partial_attention import added_up, partial_attention

_SHORTEST = 256
"""Tokens that are worth a thread of their own."""

_MANY, _SMALL = 8, 2**20
"""Pieces that are too many for a call each, if their keys take so few bytes when they are padded."""


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    kept: KeptTokens,
    rows: BlockRows,
    mask: Tensor | None,
    scaling: float,
) -> Tensor:
    """See `latent_attention`; sums are float32, and what is added up has the dtype of `query`."""
    batch, query_heads, count, head_dim = query.shape
    heads = keys.shape[1]
    q = query.reshape(batch, heads, -1, head_dim)  # [B, H, C, D], C = Hq / H * Q
    if mask is not None:
        mask = mask.unflatten(1, (heads if mask.shape[1] > 1 else 1, -1))  # [B or 1, H or 1, G or 1, Q, X]
        mask = mask.expand(-1, -1, query_heads // heads, -1, -1).flatten(2, 3)  # [B or 1, H or 1, C, X]
    out, lse = partial_attention(q, keys, values, mask, scaling)  # over exact tokens
    found = _over_kept(q, kept, rows, scaling)
    if found is not None:
        out = added_up((out, lse), found)
    return out.to(query.dtype).view(batch, query_heads, count, head_dim).transpose(1, 2)


def _over_kept(q: Tensor, kept: KeptTokens, rows: BlockRows, scaling: float) -> tuple[Tensor, Tensor] | None:
    """Attention of queries `[B, H, C, D]` over kept tokens alone, as `partial_attention` gives it.

    Rows without any have minus infinity for the log; None if no row has some.
    """
    spans = rows.spans
    if not spans:
        return None
    sizes = kept.sizes(rows)  # [H][rows that have some]
    each = [size for own in sizes for size in own]
    queries = q[list(spans)].transpose(0, 1).flatten(0, 1)[:, None]  # [pieces, 1, C, D]
    padded = len(each) * max(each) * kept.keys.shape[1] * kept.keys.element_size()
    if len(each) > _MANY and padded < _SMALL:
        outs, lses = _side_by_side(queries, kept, each, scaling)
    else:
        pieces = zip(queries.split(1), kept.keys.split(each), kept.values.split(each), strict=True)
        found = [_over_piece(query, k, v, scaling) for query, k, v in pieces]
        outs, lses = (torch.cat([pair[i] for pair in found]) for i in (0, 1))
    outs, lses = (x.unflatten(0, (q.shape[1], -1)) for x in (outs, lses))  # [H, rows that have some, ...]
    if len(spans) == len(q):
        return outs.transpose(0, 1), lses.transpose(0, 1)
    out, lse = outs.new_zeros(q.shape), lses.new_full(q.shape[:3], -torch.inf)
    out[list(spans)], lse[list(spans)] = outs.transpose(0, 1), lses.transpose(0, 1)
    return out, lse


def _side_by_side(
    queries: Tensor, kept: KeptTokens, sizes: list[int], scaling: float
) -> tuple[Tensor, Tensor]:
    """Attention of queries `[S, 1, C, D]` over their pieces, padded: `[S, C, D]` and `[S, C]`."""
    lengths = torch.tensor(sizes, device=queries.device)[:, None]
    place = torch.arange(max(sizes), device=queries.device)
    index = (lengths.cumsum(0) - lengths + place.minimum(lengths - 1)).flatten()
    shape = (len(sizes), 1, len(place), -1)
    k, v = (x.index_select(0, index).view(shape) for x in (kept.keys, kept.values))
    mask = (place < lengths)[:, None, None].expand(-1, -1, queries.shape[2], -1)
    out, lse = partial_attention(queries, k, v, mask, scaling)
    return out[:, 0], lse[:, 0]


def _over_piece(query: Tensor, keys: Tensor, values: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """Attention of queries `[1, 1, C, D]` over tokens `[L, D]`: `[1, C, D]` and `[1, C]`."""
    threads = torch.get_num_threads() if query.device.type == "cpu" else 1
    parts = min(threads, len(keys) // _SHORTEST)
    if parts < 2:
        out, lse = partial_attention(query, keys[None, None], values[None, None], None, scaling)
        return out[0], lse[0]
    middle = len(keys) - len(keys) % parts
    k, v = (x[:middle].view(1, parts, -1, x.shape[1]) for x in (keys, values))
    out, lse = partial_attention(query.expand(-1, parts, -1, -1), k, v, None, scaling)
    if middle < len(keys):
        rest = partial_attention(query, keys[None, None, middle:], values[None, None, middle:], None, scaling)
        out, lse = torch.cat([out, rest[0]], 1), torch.cat([lse, rest[1]], 1)
    shares = (lse - lse.amax(1, keepdim=True)).exp_()  # softmax would wake all threads for so little
    out = (out * (shares / shares.sum(1, keepdim=True))[..., None]).sum(1)
    return out, lse.amax(1) + shares.sum(1).log_()
