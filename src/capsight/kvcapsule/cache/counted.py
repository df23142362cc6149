"""Bytes of a cache with capsules: capsules, exact tokens, sliding windows, states."""

from __future__ import annotations

from transformers.cache_utils import Cache

from capsight.kvcapsule.cache.layer import CapsuleLayer
from capsight.kvcapsule.cache.stock import StateCopy, state_nbytes, stock_nbytes


class CountedCache(Cache):
    """A cache some of whose layers hold capsules, as far as bytes go."""

    _states: StateCopy | None = None

    @property
    def capsule_layers(self) -> dict[int, CapsuleLayer]:
        """The layers that hold capsules, by layer index."""
        return {index: layer for index, layer in enumerate(self.layers) if isinstance(layer, CapsuleLayer)}

    @property
    def nbytes(self) -> int:
        """Bytes of capsules, exact tokens, their shared index tensors, sliding windows and all states."""
        placements = {
            id(p): p for layer in self.capsule_layers.values() if (p := layer.placement) is not None
        }
        shared = sum(placement.nbytes for placement in placements.values())
        payloads = {id(x): x for layer in self.capsule_layers.values() if (x := layer.payload) is not None}
        exact = sum(
            layer.exact_nbytes if isinstance(layer, CapsuleLayer) else stock_nbytes(layer)
            for layer in self.layers
        )
        state_bytes = 0 if self._states is None else self._states.nbytes(self.layers)
        return exact + sum(payload.nbytes for payload in payloads.values()) + shared + state_bytes

    @property
    def state_nbytes(self) -> int:
        """Bytes of linear-attention and convolution states among `nbytes`, the kept copy included."""
        copy_bytes = 0 if self._states is None else self._states.state_nbytes
        return sum(map(state_nbytes, self.layers)) + copy_bytes

    @property
    def layer_nbytes(self) -> list[int]:
        """Bytes of capsules and exact tokens, or of states, a layer; what layers share is shared out."""
        return [
            layer.nbytes if isinstance(layer, CapsuleLayer) else stock_nbytes(layer) for layer in self.layers
        ]

    @property
    def nbytes_full(self) -> int:
        """Bytes that a stock `DynamicCache` takes for the same tokens; left padding is not counted."""
        return sum(
            layer.nbytes_full if isinstance(layer, CapsuleLayer) else stock_nbytes(layer)
            for layer in self.layers
        )

    @property
    def module_nbytes(self) -> int:
        """Bytes of the codecs' own tensors, which all caches of a capsule share."""
        return sum(layer.codec.module_nbytes for layer in self.capsule_layers.values())
