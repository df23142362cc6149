"""Sparse prefill: hands the layers of one prefill to BlindSight, each with the categories of its heads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from capsight.blindsight import BaseRule, Category, HeadMap, sparse_attention
from capsight.layout import PromptLayout


@dataclass(frozen=True, slots=True)
class SparsePrefill:
    """One prefill that is to follow a head map.

    Attributes:
        head_map: category of every query head.
        layout: of the whole prompt.
        config: the model's config.
        seen: tokens per row that the cache held before.
        new: tokens per row of this prefill; a forward pass of another length is not it and stays dense.
    """

    head_map: HeadMap
    layout: PromptLayout
    config: Any
    seen: int
    new: int

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None
    ) -> Tensor | None:
        """Attention output `[B, S, Hq, D]` of one layer, or None where it has to be dense.

        Args:
            layer: layer index.
            query: `[B, Hq, S, D]`.
            key: `[B, Hkv, T, D]`.
            value: `[B, Hkv, T, D]`.
            scaling: factor of the scores.
            window: the layer's sliding window, if it has one.
        """
        categories = self.head_map.categories[layer]
        if query.shape[2] != self.new or all(c is Category.DENSE for c in categories):
            return None
        layout = self.layout
        if query.shape[0] != layout.batch_size:
            layout = layout.repeat(query.shape[0] // layout.batch_size)
        output = sparse_attention(
            query,
            key,
            value,
            layout,
            categories,
            options=self.head_map.options,
            rule=BaseRule.of(self.config, window),
            scaling=scaling,
            prefix=self.seen,
        )
        return output.transpose(1, 2).contiguous()
