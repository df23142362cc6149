"""Keeps a model's M-RoPE offset with the cache it belongs to.

Qwen's models store `rope_deltas` on the model, so a second conversation overwrites that of the first.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from capsight.runtime.noted import Noted


class RopeDeltas:
    """Remembers the offset of every cache and puts it back before the cache is used again."""

    def __init__(self, model: Any) -> None:
        """Find the submodule that holds `rope_deltas`; models without one need nothing."""
        core = getattr(model, "model", model)
        self._core = core if hasattr(core, "rope_deltas") else None
        self._known: Noted[Tensor | None] = Noted()

    def restore(self, cache: Any) -> None:
        """Give the model the offset that `cache` was prefilled with; an unknown cache gets none."""
        if self._core is not None:
            self._core.rope_deltas = self.of(cache)

    def remember(self, cache: Any) -> None:
        """Keep the model's present offset for `cache`."""
        if self._core is not None:
            self._known.put(cache, self._core.rope_deltas)

    def of(self, cache: Any) -> Any:
        """Offset `[B, 1]` of the rows that `cache` has now; None if there is none, or it is not known."""
        found = self._known.get(cache)
        if found is None or found.value is None or found.order is None:
            return None if found is None else found.value
        return found.order.pick(found.value)

    def assign(self, cache: Any, value: Any) -> None:
        """Say what offset `cache`, which comes from a file, was prefilled with."""
        if self._core is not None:
            self._known.put(cache, value)

    def value(self) -> Any:
        """The model's present offset."""
        return None if self._core is None else self._core.rope_deltas

    def put(self, value: Any) -> None:
        """Set the model's offset."""
        if self._core is not None:
            self._core.rope_deltas = value
