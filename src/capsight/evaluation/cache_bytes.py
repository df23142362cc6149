"""`CacheBytes`: bytes of a cache, keys and values apart from states."""

from __future__ import annotations

from typing import Any, NamedTuple

from capsight.kvcapsule.cache.stock import state_nbytes, stock_nbytes


class CacheBytes(NamedTuple):
    """Bytes of a cache now.

    Attributes:
        kv: keys and values, or what stands for them; modules are not counted.
        kv_full: keys and values of a full cache of the same tokens.
        states: states, which no method compresses, a copy of them that `encapsulate` keeps included.
    """

    kv: int
    kv_full: int
    states: int

    @classmethod
    def of(cls, cache: Any) -> CacheBytes:
        """Count a cache of `enable` or of transformers; None is empty."""
        if cache is None:
            return cls(0, 0, 0)
        state_bytes = sum(map(state_nbytes, cache.layers))
        if not hasattr(cache, "nbytes_full"):
            total = sum(map(stock_nbytes, cache.layers)) - state_bytes
            return cls(total, total, state_bytes)
        states = getattr(cache, "state_nbytes", state_bytes)
        return cls(cache.nbytes - states, cache.nbytes_full - state_bytes, states)
