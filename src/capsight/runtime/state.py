"""What the attention function has to know while a model runs; a context variable carries it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from capsight.kvcapsule import CapsuleCache
from capsight.kvcapsule.cache.steps import Steps
from capsight.runtime.prefill import SparsePrefill


@dataclass(frozen=True, slots=True)
class RuntimeState:
    """State of one call of the model.

    Attributes:
        cache: the capsule cache in use; its `key_bias` hides evicted tokens, its `observe`, where it has
            one, is shown the queries.
        prefill: the prefill that is running, where it follows a head map.
        generating: whether it is a call of `FastModel`, which tells the model its positions.
    """

    cache: CapsuleCache | None = None
    prefill: SparsePrefill | None = None
    generating: bool = False

    @property
    def steps(self) -> Steps | None:
        """What the cache has while its steps may be compiled."""
        return None if self.cache is None else self.cache.steps


_STATE: ContextVar[RuntimeState | None] = ContextVar("capsight_runtime_state", default=None)


def current_state() -> RuntimeState:
    """State of the call that is running."""
    return _STATE.get() or RuntimeState()


@contextmanager
def running(state: RuntimeState) -> Iterator[None]:
    """Make `state` the current one inside the block."""
    token = _STATE.set(state)
    try:
        yield
    finally:
        _STATE.reset(token)
