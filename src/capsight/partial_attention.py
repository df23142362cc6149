"""Attention over part of the keys with the log of its normaliser, so that parts can be added up.

As in Flash-Decoding: attention over disjoint sets of keys is their outputs, weighted by their normalisers.
"""

from __future__ import annotations

import torch
from torch import Tensor

Partial = tuple[Tensor, Tensor]
"""The output `[B, H, C, D]` of attention over part of the keys, and the log of its normaliser `[B, H, C]`."""


def partial_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    scaling: float,
    *,
    causal: bool = False,
) -> Partial:
    """Attention over some of the tokens, and the log of the normaliser.

    On CPUs it is the kernel behind torch's own `scaled_dot_product_attention`, which does not give the log.

    Args:
        query: `[B, H, C, D]`.
        keys: `[B, H, X, D]`, X > 0.
        values: `[B, H, X, D]`.
        mask: bool or additive, `[B or 1, H or 1, C, X]`, or None; every query sees a token.
        scaling: factor of the scores.
        causal: query i sees keys up to i only; takes no mask.

    Returns:
        `[B, H, C, D]` in the dtype of `query`, and float32 `[B, H, C]` (float64 of float64).
    """
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=query.dtype, device=mask.device).masked_fill(~mask, -torch.inf)
    if has_kernel(query, keys, values):
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, keys, values, is_causal=causal, attn_mask=mask, scale=scaling
        )
        return out, lse
    if causal:
        seen = torch.ones(query.shape[2], keys.shape[2], dtype=torch.bool, device=query.device).tril()
        mask = torch.zeros_like(seen, dtype=query.dtype).masked_fill(~seen, -torch.inf)
    work = torch.promote_types(query.dtype, torch.float32)
    scores = query.to(work) @ keys.to(work).mT * scaling  # [B, H, C, X]
    scores = scores if mask is None else scores + mask
    return (scores.softmax(-1) @ values.to(work)).to(query.dtype), scores.logsumexp(-1)


def has_kernel(*tensors: Tensor) -> bool:
    """Whether a fused kernel gives the log for these; else all scores are in memory at once."""
    wanted = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    return tensors[0].device.type == "cpu" and not wanted


def added_up(first: Partial, second: Partial) -> Tensor:
    """Attention over the keys of both parts: `[B, H, C, D]` in the wider dtype of outputs and logs.

    A part may have seen nothing (minus infinity for the log); where neither did, the result is NaN.
    """
    (out, lse), (other, of_other) = first, second
    top = torch.maximum(lse, of_other)
    shares = [(x - top).exp_() for x in (lse, of_other)]  # [B, H, C]
    total = shares[0] + shares[1]
    return out * (shares[0] / total)[..., None] + other * (shares[1] / total)[..., None]
