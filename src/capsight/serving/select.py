"""`select_tokens`: which image tokens a KV head keeps in a paged engine, and in its twin for transformers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_RIDGE = 1e-3  # of the mean variance
_SHARED = 0.5  # of the tokens that are kept


def select_tokens(keys: Tensor, values: Tensor, count: int, images: Sequence[int]) -> Tensor:
    """The tokens that stand out most, each head on its own; images share half of them equally.

    The score of a token is the product of the leverages of its key and of its value among those of the
    prompt: how far each lies from the mean, in units of how far tokens do (CUR KV compression, arXiv
    2509.15038, approximates leverages by norms; here they are exact, and centred). Half of the tokens are
    the best of each image, equally many; the others the best of what is left. So questions about all images
    ("how many are tables?") find something of each. Nothing is learnt, and no head needs to know of another,
    whichever process has it.

    Args:
        keys: `[H, T, D]` of image tokens, after RoPE.
        values: `[H, T, D]`.
        count: tokens to keep of the T, at least one of each image.
        images: tokens of each image, T in all.

    Returns:
        int64 `[H, count]`, ascending; earlier tokens win ties.
    """
    return best_tokens(leverage(torch.stack([keys, values])).prod(0), count, images)


def best_tokens(scores: Tensor, count: int, images: Sequence[int]) -> Tensor:
    """The highest scores of each row, half of them shared equally by the images.

    Args:
        scores: float `[H, T]`.
        count: tokens to keep of the T, at least one of each image.
        images: tokens of each image, T in all.

    Returns:
        int64 `[H, count]`, ascending; earlier tokens win ties.
    """
    each = max(1, int(_SHARED * count) // len(images))
    certain = [
        torch.zeros_like(own, dtype=torch.bool).scatter_(1, _best(own, each), True)
        for own in scores.split(list(images), 1)
    ]
    scores = scores.masked_fill(torch.cat(certain, 1), torch.inf)
    return _best(scores, count).sort(dim=1).values


def _best(scores: Tensor, count: int) -> Tensor:
    """Where the highest scores lie in each row."""
    return scores.argsort(dim=1, descending=True, stable=True)[:, :count]


def leverage(x: Tensor) -> Tensor:
    """Squared distance of each token from the mean, in units of the channels' covariance.

    Args:
        x: `[..., T, D]`.

    In float64: sums in float32 move scores three times as far as what engines round otherwise in their keys,
    and more tokens of nearly equal scores would be exchanged between engines.

    Returns:
        float64 `[..., T]`.
    """
    x = x.double()
    centred = x - x.mean(-2, keepdim=True)
    moment = centred.mT @ centred / x.shape[-2]  # [..., D, D]
    ridge = _RIDGE * moment.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(1e-12)
    factor = torch.linalg.cholesky(
        moment + torch.diag_embed(ridge[..., None].expand(*ridge.shape, x.shape[-1]))
    )
    return torch.linalg.solve_triangular(factor, centred.mT, upper=False).square().sum(-2)
