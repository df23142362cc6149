"""`select_tokens`: which image tokens a KV head keeps in a paged engine, and in its twin for transformers."""

from __future__ import annotations

import torch
from torch import Tensor

_RIDGE = 1e-3  # of the mean variance


def select_tokens(keys: Tensor, values: Tensor, count: int) -> Tensor:
    """The tokens that stand out most, each head on its own, over all images of a prompt.

    The score of a token is the product of the leverages of its key and of its value among those of the
    prompt: how far each lies from the mean, in units of how far tokens do (CUR KV compression, arXiv
    2509.15038, approximates leverages by norms; here they are exact, and centred). Nothing is learnt, and no
    head needs to know of another, whichever process has it.

    Args:
        keys: `[H, T, D]` of image tokens, after RoPE.
        values: `[H, T, D]`.
        count: tokens to keep of the T.

    Returns:
        int64 `[H, count]`, ascending; earlier tokens win ties.
    """
    scores = leverage(keys) * leverage(values)
    best = scores.argsort(dim=1, descending=True, stable=True)[:, :count]
    return best.sort(dim=1).values


def leverage(x: Tensor) -> Tensor:
    """Squared distance of each token from the mean, in units of the channels' covariance.

    Args:
        x: `[H, T, D]`.

    Returns:
        float64 `[H, T]`.
    """
    centred = x.double() - x.double().mean(1, keepdim=True)
    moment = centred.transpose(1, 2) @ centred / x.shape[1]  # [H, D, D]
    ridge = _RIDGE * moment.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-12)
    moment = moment + torch.diag_embed(ridge[:, None].expand(-1, x.shape[2]))
    solved = torch.linalg.solve(moment, centred.transpose(1, 2)).transpose(1, 2)
    return (centred * solved).sum(2)
