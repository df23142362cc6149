"""`paged-pooled`: what the vLLM plugin would keep if the KV heads of a layer shared their tokens.

Paged memory wants equal counts; `paged`, which has them, is `capsight.serving.method.PagedCapsules`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from capsight.serving.method import PagedCapsules, PagedCodec
from capsight.serving.plan import RequestPlan
from capsight.serving.select import best_tokens, leverage


class PooledCodec(PagedCodec):
    """The same scores, and as many tokens of a layer."""

    def chosen(self, keys: Tensor, values: Tensor, plan: RequestPlan) -> Tensor:
        """Which of a row's image tokens `[H, T, D]` to keep: bool `[H, T]`."""
        heads, sizes = len(keys), list(plan.sizes)
        parts = leverage(torch.stack([keys, values])).prod(0).split(sizes, 1)
        scores = torch.cat([part.flatten() for part in parts])[None]  # image by image, all heads of each
        best = best_tokens(scores, heads * plan.kept_image_tokens, [heads * size for size in sizes])
        keep = torch.zeros_like(scores, dtype=torch.bool).scatter(1, best, True)[0]
        return torch.cat([x.view(heads, -1) for x in keep.split([heads * size for size in sizes])], 1)


class PooledPaged(PagedCapsules):
    """`PagedCapsules` without equal counts."""

    name = "paged-pooled"
    codec = PooledCodec
