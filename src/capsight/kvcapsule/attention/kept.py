"""Attention over tokens that each KV head keeps for itself: nothing is rebuilt.

What a head keeps of a row is one piece of memory, but pieces differ in length, and a call for each would cost
more than the work. Where they are short they are copied side by side, after the exact tokens, for one call.
Where they are long all that is kept is cut into chunks of equal length, where it lies: one call reads all
chunks that are of one piece, and another the few tokens, copied, at the ends of pieces. The sums are then
added up by the logs of their normalisers, as in Flash-Decoding.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from capsight.kvcapsule.attention.blocks import BlockRows, KeptTokens
from capsight.kvcapsule.attention.pieces import Chunks, Runs, pieces_of
from capsight.partial_attention import Partial, partial_attention


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    tokens: KeptTokens,
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
    pieces = pieces_of(tokens, rows, batch)
    if isinstance(pieces, Runs):
        out = _side_by_side(q, keys, values, tokens, pieces, mask, scaling)
    else:
        exact = partial_attention(q, keys, values, mask, scaling)
        out = exact[0] if pieces is None else _with_chunks(exact, q, tokens, pieces, scaling)
    return out.to(query.dtype).view(batch, query_heads, count, head_dim).transpose(1, 2)


def _side_by_side(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    tokens: KeptTokens,
    runs: Runs,
    mask: Tensor | None,
    scaling: float,
) -> Tensor:
    """Attention of queries `[B, H, C, D]` over exact tokens and copies of kept ones: `[B, H, C, D]`."""
    sizes = q.shape[:2]
    k, v = (
        torch.cat((exact, runs.gather(x).unflatten(0, sizes)), 2)
        for exact, x in ((keys, tokens.keys), (values, tokens.values))
    )
    hidden = runs.hidden.to(q.dtype).view(*sizes, 1, -1)  # [B, H, 1, W]
    if mask is None:
        whole_mask = torch.nn.functional.pad(hidden, (keys.shape[2], 0))
    else:
        if mask.dtype == torch.bool:
            mask = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill(~mask, -torch.inf)
        every = (*sizes, mask.shape[2], -1)
        whole_mask = torch.cat((mask.to(q.dtype).expand(every), hidden.expand(every)), 3)  # [B, H, C, X + W]
    return scaled_dot_product_attention(q, k, v, attn_mask=whole_mask, scale=scaling)


def _with_chunks(exact: Partial, q: Tensor, tokens: KeptTokens, chunks: Chunks, scaling: float) -> Tensor:
    """Attention of queries `[B, H, C, D]` over kept tokens and, already there, over exact ones."""
    asked = q.flatten(0, 1).index_select(0, chunks.piece)  # [n + R, C, D]
    k, v = (chunks.where_they_lie(x)[None] for x in (tokens.keys, tokens.values))  # [1, n, size, D]
    partials = [[x[0] for x in partial_attention(asked[None, : chunks.count], k, v, None, scaling)]]
    if chunks.rest is not None:
        k, v = (chunks.rest.gather(x)[:, None] for x in (tokens.keys, tokens.values))  # [R, 1, W, D]
        hidden = chunks.rest.hidden.to(q.dtype)[:, None, None].expand(-1, -1, q.shape[2], -1)
        rest = partial_attention(asked[chunks.count :, None], k, v, hidden, scaling)
        partials.append([x[:, 0] for x in rest])
    partials.append([x.flatten(0, 1) for x in exact])
    out, lse = (  # [B H, T, C, D] and [B H, T, C]
        torch.cat(parts).index_select(0, chunks.parts).unflatten(0, chunks.none.shape[:2])
        for parts in zip(*partials, strict=True)
    )
    shares = (lse + chunks.none).softmax(1)[..., None]
    return (out * shares).sum(1).view(q.shape)
