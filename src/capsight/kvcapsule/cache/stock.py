"""What capsight has to know of cache layers that hold no capsules: sliding windows, and layers with states.

A state (of linear attention, of a convolution) stands for all tokens seen and cannot be rolled back by a
number of tokens, and a window that is full has forgotten what came before it. So a copy is kept of one
length, and cropping comes back to that length only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import (
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionCacheLayerMixin,
)


def full_attention_layers(config: PreTrainedConfig) -> list[int]:
    """Indices of a model's full-attention layers: those whose vision tokens can be compressed."""
    layers = DynamicCache(config=config).layers
    return [index for index, layer in enumerate(layers) if type(layer) is DynamicLayer]


def has_states(layer: Any) -> bool:
    """Whether a cache layer keeps states instead of keys and values."""
    return isinstance(layer, LinearAttentionCacheLayerMixin)


def cannot_crop(layer: Any) -> bool:
    """Whether a cache layer cannot give up its last tokens by itself."""
    if isinstance(layer, DynamicSlidingWindowLayer):
        return layer.cumulative_length >= layer.sliding_window and not layer.record_past
    return has_states(layer)


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


def repeat_rows(cache: Any, repeats: int) -> None:
    """Repeat every row of a cache in place; a stock one with states cannot by itself."""
    if type(cache) is not DynamicCache or not any(map(has_states, cache.layers)):
        cache.batch_repeat_interleave(repeats)
        return
    batch = next(len(state) for layer in cache.layers for _, _, state in states(layer))
    rows = torch.arange(batch).repeat_interleave(repeats)
    for layer in cache.layers:
        move_rows(layer, rows)


def set_state(layer: Any, kind: str, number: int, state: Tensor) -> None:
    """Give a layer a state of its own `[B, ...]`, as if it had been there since the prefill."""
    layer.lazy_initialization(**{f"{kind}_states": state}, state_idx=number)
    getattr(layer, f"{kind}_states")[number].copy_(state)
    layer.has_previous_state[number] = True
    layer.device = state.device if layer.device is None else layer.device


class StateCopy:
    """A copy of all states and sliding windows of a cache at one length.

    Windows are not copied: a layer makes new tensors when it moves on, and the old ones are kept.

    Attributes:
        length: tokens per row that they stand for.
    """

    def __init__(self, layers: Sequence[Any], length: int) -> None:
        """Keep what `layers` hold now."""
        self.length = length
        self._held = [[(kind, n, state.clone()) for kind, n, state in states(layer)] for layer in layers]
        self._windows: dict[int, tuple[Any, Any, int]] = {
            index: (layer.keys, layer.values, layer.cumulative_length)
            for index, layer in enumerate(layers)
            if isinstance(layer, DynamicSlidingWindowLayer) and layer.is_initialized
        }

    @property
    def state_nbytes(self) -> int:
        """Bytes of the copied states."""
        return sum(state.nbytes for held in self._held for _, _, state in held)

    def nbytes(self, layers: Sequence[Any]) -> int:
        """Bytes of copied states and of windows that `layers` no longer hold."""
        gone = [old for i, old in self._windows.items() if layers[i].keys is not old[0]]
        return self.state_nbytes + sum(keys.nbytes + values.nbytes for keys, values, _ in gone)

    def put_back(self, layers: Sequence[Any]) -> None:
        """Give the layers their states and windows again; the copy stays."""
        for layer, held in zip(layers, self._held, strict=True):
            for kind, number, state in held:
                set_state(layer, kind, number, state)
        for index, (keys, values, length) in self._windows.items():
            layer = layers[index]
            layer.keys, layer.values, layer.cumulative_length = keys, values, length

    def move_rows(self, rows: Tensor) -> None:
        """Follow the rows of the cache."""

        def moved(state: Tensor) -> Tensor:
            return state.index_select(0, rows.to(state.device))

        self._held = [[(kind, n, moved(state)) for kind, n, state in held] for held in self._held]
        self._windows = {i: (moved(k), moved(v), n) for i, (k, v, n) in self._windows.items()}
