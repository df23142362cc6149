"""Looks at the queries of a model's text layers while it runs, and leaves the model as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from capsight.attention_swap import swapped_attention

ATTENTION_NAME = "capsight_queries"
_SEEN: ContextVar[dict[int, Tensor]] = ContextVar("capsight_queries")


@contextmanager
def recorded_queries(model: Any) -> Iterator[dict[int, Tensor]]:
    """Inside the context the text model's attention is SDPA, and leaves its queries here.

    Args:
        model: a transformers vision-language model.

    Yields:
        Queries `[B, Hq, Q, D]` of each layer's last call, after RoPE, by layer index.
    """
    seen: dict[int, Tensor] = {}
    token = _SEEN.set(seen)
    try:
        with swapped_attention(model, ATTENTION_NAME, _attention, sdpa_mask):
            yield seen
    finally:
        _SEEN.reset(token)


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """transformers' attention signature: returns `[B, S, Hq, D]` and no weights."""
    _SEEN.get()[int(module.layer_idx)] = query
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)[0], None
