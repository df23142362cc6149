"""Attention over latents in plain torch: the reference of the native code."""

from __future__ import annotations

import torch
from torch import Tensor

from capsight.kvcapsule.attention.latents import LatentTokens, LayerBasis


def plain_joint_attention(
    query: Tensor, latents: Tensor, tokens: LatentTokens, basis: LayerBasis, scaling: float
) -> tuple[Tensor, Tensor]:
    """Attention over keys and values that are rebuilt, one row at a time.

    Args:
        query: `[B, Hq, Q, D]`, after RoPE; Hq is a multiple of H.
        latents: `[T, R]`.
        tokens: where they belong, T in all.
        basis: the layer's.
        scaling: factor of the scores.

    Returns:
        float32 `[B, Hq, Q, D]`, 0 where a row has no token, and the log of the normaliser `[B, Hq, Q]`, minus
        infinity there; to be added up with attention over exact tokens.
    """
    work = torch.promote_types(latents.dtype, torch.float32)
    turning, group = tokens.turning, query.shape[1] // len(basis.key_mean)
    out = query.new_zeros(query.shape[:3] + basis.value_mean.shape[1:], dtype=work)
    lse = query.new_full(query.shape[:3], -torch.inf, dtype=work)
    for row, (start, count) in enumerate(zip(tokens.starts.tolist(), tokens.counts.tolist(), strict=True)):
        if not count:
            continue
        span = slice(start, start + count)
        z = latents[span].to(work)
        keys, values = (  # [H, n, D]
            (z * steps.to(work)) @ axes.to(work).mT + mean[:, None].to(work)
            for axes, steps, mean in (
                (basis.key_axes, basis.key_steps, basis.key_mean),
                (basis.value_axes, basis.value_steps, basis.value_mean),
            )
        )
        pairs = torch.arange(len(turning.axes))
        first, second = (2 * pairs, 2 * pairs + 1) if turning.interleaved else (pairs, pairs + len(pairs))
        angles = tokens.positions[:, span].double()[turning.axes].T * turning.frequencies  # [n, P]
        cos, sin = ((x * turning.scaling).to(work) for x in (angles.cos(), angles.sin()))
        a, b = keys[..., first], keys[..., second]
        keys = keys.index_copy(2, first, a * cos - b * sin).index_copy(2, second, b * cos + a * sin)
        keys, values = (x.repeat_interleave(group, 0) for x in (keys, values))
        scores = scaling * query[row].to(work) @ keys.mT  # [Hq, Q, n]
        lse[row], out[row] = scores.logsumexp(-1), scores.softmax(-1) @ values
    return out, lse
