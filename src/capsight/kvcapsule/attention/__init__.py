"""Attention over capsules without rebuilding the tokens that they stand for (our design).

Plain tensors in, plain tensors out, so that another runtime can share it. Where tokens follow from others it
is a kernel on a GPU (`triton_attention`), elsewhere a handful of torch operations (`plain`), and both give
the same up to rounding; where nothing but kept tokens is seen it is SDPA on these (`kept`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from capsight.kvcapsule.attention import kept, plain
from capsight.kvcapsule.attention.blocks import BlockRows, KeptTokens, LatentBlocks, TokenMap
from capsight.kvcapsule.attention.choice import Kind, LatentKernelError, give_up, reason_against, warn

__all__ = ["BlockRows", "KeptTokens", "LatentBlocks", "LatentKernelError", "TokenMap", "latent_attention"]


def latent_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    blocks: LatentBlocks | KeptTokens,
    rows: BlockRows,
    mask: Tensor | None,
    scaling: float,
) -> Tensor:
    """Softmax attention over exact tokens and over all tokens that capsules keep or stand for.

    Every query sees all blocks of its row, and at least one token. Scores and sums are float32 whatever
    the inputs are. CUDA tensors of `LatentBlocks` go to the Triton kernel; where it cannot be used a warning
    says why, once, and torch takes over.

    Args:
        query: `[B, Hq, Q, D]`; Hq is a multiple of H.
        keys: `[B, H, X, D]`, exact tokens (finite where masked).
        values: `[B, H, X, D]`.
        blocks: capsules of M blocks.
        rows: where they belong.
        mask: over exact tokens, bool or additive `[B or 1, 1 or Hq, Q, X]`; None if all are seen.
        scaling: factor of the scores.

    Returns:
        `[B, Q, Hq, D]` in the dtype of `query`.
    """
    if isinstance(blocks, KeptTokens):
        return kept.attend(query, keys, values, blocks, rows, mask, scaling)
    given = query, keys, values, blocks, rows, mask, scaling
    if query.is_cuda and not (torch.is_grad_enabled() and query.requires_grad):
        kind = Kind.of(query, blocks.keys)
        reason = reason_against(kind)
        if not reason:
            from capsight.kvcapsule.attention import triton_attention  # needs triton

            try:
                return triton_attention.attend(*given)
            except LatentKernelError as error:
                reason = give_up(kind, error)
        warn(reason)
    return plain.attend(*given)
