"""What capsight has to know of cache layers that hold no capsules: sliding windows, and layers with states.

A state (of linear attention, of a convolution) stands for all tokens seen and cannot be rolled back by a
number of tokens. So a copy is kept of one length, and cropping comes back to that length only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import LinearAttentionCacheLayerMixin


def has_states(layer: Any) -> bool:
    """Whether a cache layer keeps states instead of keys and values."""
    return isinstance(layer, LinearAttentionCacheLayerMixin)


def states(layer: Any) -> Iterator[tuple[str, int, Tensor]]:
    """The states that a layer holds now: kind ("conv" or "recurrent"), number, tensor `[B, ...]`."""
    if has_states(layer):
        for kind, held in (("conv", layer.conv_states), ("recurrent", layer.recurrent_states)):
            yield from ((kind, number, state) for number, state in held.items() if state is not None)


def state_nbytes(layer: Any) -> int:
    """Bytes of the states of a layer."""
    return sum(state.nbytes for _, _, state in states(layer))


def stock_nbytes(layer: Any) -> int:
    """Bytes of the keys, values and states of a transformers layer."""
    held = (getattr(layer, "keys", None), getattr(layer, "values", None))
    return state_nbytes(layer) + sum(x.nbytes for x in held if x is not None)


def move_rows(layer: Any, rows: Tensor) -> None:
    """Make row i of a layer what row `rows[i]` (int64 `[B']`) was."""
    if has_states(layer):
        layer.reorder_cache(rows)
    else:
        layer.batch_select_indices(rows)


def set_state(layer: Any, kind: str, number: int, state: Tensor) -> None:
    """Give a layer a state of its own `[B, ...]`, as if it had been there since the prefill."""
    layer.lazy_initialization(**{f"{kind}_states": state}, state_idx=number)
    getattr(layer, f"{kind}_states")[number].copy_(state)
    layer.has_previous_state[number] = True
    layer.device = state.device if layer.device is None else layer.device


class StateCopy:
    """A copy of all states of a cache at one length.

    Attributes:
        length: tokens per row that they stand for.
    """

    def __init__(self, layers: Sequence[Any], length: int) -> None:
        """Copy the states that `layers` hold now."""
        self.length = length
        self._held = [[(kind, n, state.clone()) for kind, n, state in states(layer)] for layer in layers]

    @property
    def nbytes(self) -> int:
        """Bytes of the copies."""
        return sum(state.nbytes for held in self._held for _, _, state in held)

    def put_back(self, layers: Sequence[Any]) -> None:
        """Give the layers their states again; the copy stays."""
        for layer, held in zip(layers, self._held, strict=True):
            for kind, number, state in held:
                set_state(layer, kind, number, state)

    def move_rows(self, rows: Tensor) -> None:
        """Follow the rows of the cache."""
        self._held = [
            [(kind, n, torch.index_select(state, 0, rows.to(state.device))) for kind, n, state in held]
            for held in self._held
        ]
