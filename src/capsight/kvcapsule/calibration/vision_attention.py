"""`VisionAttention`: how much of its attention each layer pays to vision tokens, seen at calibration."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from capsight.attention_swap import swapped_attention
from capsight.layout import PromptLayout, RowLayout

ATTENTION_NAME = "capsight_fit"

_QUERIES = 32  # of each row, the last ones after its images: bounds the memory of their weights


class VisionAttention:
    """Running mean over prompts, by layer, of the attention that text after the images pays to them.

    The attention function is stock SDPA, registered with transformers under a name of its own and
    chosen for the text model while it is watched; nothing is patched.
    """

    def __init__(self) -> None:
        """Start with nothing seen."""
        self._total: defaultdict[int, float] = defaultdict(float)
        self._rows: defaultdict[int, int] = defaultdict(int)

    def share(self, layer: int) -> float:
        """Mean over rows, queries and heads, between 0 and 1; 0 where no text followed an image."""
        return self._total[layer] / max(self._rows[layer], 1)

    def state(self) -> dict[int, tuple[float, int]]:
        """Sum over rows, and number of rows, by layer."""
        return {layer: (total, self._rows[layer]) for layer, total in self._total.items()}

    def restore(self, state: Mapping[int, tuple[float, int]]) -> None:
        """Go on from a `state`."""
        for layer, (total, rows) in state.items():
            self._total[layer], self._rows[layer] = total, rows

    def join(self, other: VisionAttention) -> None:
        """Add what another one has seen."""
        for layer, (total, rows) in other.state().items():
            self._total[layer] += total
            self._rows[layer] += rows

    @contextmanager
    def watching(self, model: Any, layout: PromptLayout) -> Iterator[None]:
        """Inside the block, a prefill of the prompts of `layout` by `model` is seen."""
        token = _WATCH.set((self, layout))
        try:
            with swapped_attention(model, ATTENTION_NAME, _attention, sdpa_mask):
                yield
        finally:
            _WATCH.reset(token)

    def see(self, layer: int, query: Tensor, key: Tensor, scaling: float, layout: PromptLayout) -> None:
        """Add what one layer attends to.

        Args:
            layer: its index.
            query: `[B, Hq, S, D]`, after RoPE.
            key: `[B, H, S, D]`, after RoPE.
            scaling: factor on the scores.
            layout: of the B rows, S tokens each.
        """
        for row, q, k in zip(layout.rows, query, key, strict=True):
            if row.blocks and row.blocks[-1].end < row.length:
                self._total[layer] += _share(row, q, k, scaling)
                self._rows[layer] += 1


_WATCH: ContextVar[tuple[VisionAttention, PromptLayout]] = ContextVar("capsight_vision_attention")


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """transformers' attention signature: returns `[B, S, Hq, D]` and no weights."""
    seen, layout = _WATCH.get()
    scaling = kwargs.get("scaling") or query.shape[-1] ** -0.5
    if kwargs.get("sliding_window") is None:
        seen.see(int(module.layer_idx), query, key, scaling, layout)
    output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    return output, None


def _share(row: RowLayout, query: Tensor, key: Tensor, scaling: float) -> float:
    """Attention of a row's last text queries `[Hq, S, D]` to its vision tokens among keys `[H, S, D]`."""
    length, columns = key.shape[1], torch.arange(key.shape[1], device=key.device)
    first = max(row.blocks[-1].end, length - _QUERIES)
    q = query[:, first:].float().unflatten(0, (len(key), -1))  # [H, G, q, D]
    scores = q @ key.float()[:, None].mT * scaling  # [H, G, q, S]
    hidden = (columns > columns[first:, None]) | (columns < row.pad_left)
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1).mean((0, 1, 2))  # [S]
    return float(sum(weights[block.start : block.end].sum() for block in row.blocks))
