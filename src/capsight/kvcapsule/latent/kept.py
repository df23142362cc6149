"""Attention over tokens that each KV head keeps for itself: nothing is padded, copied or rebuilt.

What a head keeps of a row is one piece of memory, but pieces differ in length. Each is attended to on its
own, in as many parts as there are threads, the exact tokens of all rows and heads together; parts are then
added up by the logs of their normalisers, as in Flash-Decoding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from capsight.kvcapsule.latent.blocks import BlockRows, KeptTokens

_SHORTEST = 256
"""Tokens that are worth a thread of their own."""


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
    exact, exact_lse = partial_attention(q, keys, values, mask, scaling)
    threads = torch.get_num_threads() if query.device.type == "cpu" else 1
    outs = exact.new_zeros(threads + 2, *exact.shape)  # [P, B, H, C, D]
    lses = exact_lse.new_full((threads + 2, *exact_lse.shape), -torch.inf)
    outs[0], lses[0] = exact, exact_lse
    for head, row, start, stop in kept.spans(rows):
        parts = min(threads, max((stop - start) // _SHORTEST, 1))
        middle = stop - (stop - start) % parts
        own = q[row, head].expand(1, parts, -1, -1)
        k, v = (x[start:middle].view(1, parts, -1, head_dim) for x in (kept.keys, kept.values))
        found = partial_attention(own, k, v, None, scaling)
        outs[1 : parts + 1, row, head], lses[1 : parts + 1, row, head] = found[0][0], found[1][0]
        if middle < stop:
            k, v = (x[None, None, middle:stop] for x in (kept.keys, kept.values))
            found = partial_attention(own[:, :1], k, v, None, scaling)
            outs[parts + 1, row, head], lses[parts + 1, row, head] = found[0][0, 0], found[1][0, 0]
    shares = lses.softmax(0)[..., None]  # [P, B, H, C, 1]
    out = (outs * shares).sum(0).to(query.dtype)  # [B, H, C, D]
    return out.view(batch, query_heads, count, head_dim).transpose(1, 2)


def partial_attention(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scaling: float
) -> tuple[Tensor, Tensor]:
    """Attention over some of the tokens, and the log of the normaliser.

    On CPUs it is the kernel behind torch's own `scaled_dot_product_attention`, which does not give the log.

    Args:
        query: `[B, H, C, D]`.
        keys: `[B, H, X, D]`, X > 0.
        values: `[B, H, X, D]`.
        mask: bool or additive, `[B or 1, H or 1, C, X]`, or None; every query sees a token.
        scaling: factor of the scores.

    Returns:
        `[B, H, C, D]` in the dtype of `query`, and float32 `[B, H, C]` (float64 of float64).
    """
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=query.dtype, device=mask.device).masked_fill(~mask, -torch.inf)
    if query.device.type == "cpu" and not (torch.is_grad_enabled() and query.requires_grad):
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, keys, values, attn_mask=mask, scale=scaling
        )
        return out, lse
    work = torch.promote_types(query.dtype, torch.float32)
    scores = query.to(work) @ keys.to(work).mT * scaling  # [B, H, C, X]
    scores = scores if mask is None else scores + mask
    return (scores.softmax(-1) @ values.to(work)).to(query.dtype), scores.logsumexp(-1)
