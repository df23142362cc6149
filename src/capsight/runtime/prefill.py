"""Sparse prefill: hands the layers of one prefill to BlindSight, each with the categories of its heads."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from capsight.blindsight import BaseRule, Category, HeadMap, sparse_attention
from capsight.blindsight.attention.choice import mask_wins
from capsight.errors import OptionError
from capsight.layout import PromptLayout

Prefill = Literal["auto", "sparse"]
"""Whether prefills follow the head map where that is no slower ("auto"), or all of them."""


def check_prefill(name: str) -> None:
    """Raise unless it is one of `Prefill`.

    Raises:
        OptionError: it is not.
    """
    if name not in get_args(Prefill):
        raise OptionError(f"prefill must be one of {list(get_args(Prefill))}, not {name!r}")


def follows(prefill: Prefill, device: torch.device, dtype: torch.dtype, tokens: int) -> bool:
    """Whether a prefill of so many tokens follows the head map."""
    return prefill == "sparse" or mask_wins(device, dtype, tokens)


@dataclass(frozen=True, slots=True)
class SparsePrefill:
    """One prefill that is to follow a head map, in one forward pass or in chunks (`prefill_chunk_size`).

    Attributes:
        head_map: category of every query head.
        layout: of the whole prompt.
        config: the model's config.
        seen: tokens per row that the cache held before.
        new: tokens per row of this prefill; what comes after them (decoding) stays dense.
    """

    head_map: HeadMap
    layout: PromptLayout
    config: Any
    seen: int
    new: int
    _done: dict[int, int] = field(default_factory=dict, init=False, repr=False, compare=False)

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None
    ) -> Tensor | None:
        """Attention output `[B, S, Hq, D]` of one layer, or None where it has to be dense.

        Every layer counts the tokens it has been given: a sliding layer's cache forgets old keys, so
        where a chunk lies cannot be told from the number of its keys.

        Args:
            layer: layer index.
            query: `[B, Hq, S, D]`.
            key: `[B, Hkv, T, D]`.
            value: `[B, Hkv, T, D]`.
            scaling: factor of the scores.
            window: the layer's sliding window, if it has one.
        """
        done, rows = self._done.get(layer, 0), query.shape[2]
        if done + rows > self.new:
            return None
        self._done[layer] = done + rows
        categories = self.head_map.categories[layer]
        if all(c is Category.DENSE for c in categories):
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
            prefix=self.seen + done,
        )
        return output.transpose(1, 2).contiguous()
