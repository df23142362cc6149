"""What calls ask of the caches they are given: whose they are, and that one call at a time has one."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers.cache_utils import Cache, DynamicCache

from capsight.errors import CapsightError, OptionError
from capsight.kvcapsule.cache.stock import states

_LOCK = threading.Lock()
_IN_USE: set[int] = set()


def is_stock(cache: Any) -> bool:
    """Whether a cache is one of transformers' own classes."""
    return isinstance(cache, Cache) and type(cache).__module__ == Cache.__module__


def is_empty_stock(cache: Any) -> bool:
    """Whether a cache is what transformers itself would begin with."""
    return type(cache) is DynamicCache and not any(
        getattr(layer, "is_initialized", False) or any(states(layer)) for layer in cache.layers
    )


def the_cache(past_key_values: Any, cache: Any) -> Any:
    """The cache that a call was given, by either name; None if it was given none.

    Raises:
        OptionError: it was given two, or something else.
    """
    if past_key_values is not None and cache is not None and past_key_values is not cache:
        raise OptionError("past_key_values and cache are two names of one argument; give one of them")
    given = past_key_values if cache is None else cache
    if given is not None and not isinstance(given, Cache):
        raise OptionError(f"past_key_values takes a cache of transformers or of capsight, not {given!r:.60}")
    return given


@contextmanager
def in_use(cache: Any) -> Iterator[None]:
    """Inside the block no other call may have `cache`.

    Raises:
        CapsightError: another has it.
    """
    with _LOCK:
        if cache is not None and id(cache) in _IN_USE:
            raise CapsightError(
                "another call is going on over this cache; give each its own: copy.deepcopy(cache), or "
                "encapsulate once more"
            )
        _IN_USE.add(id(cache))
    try:
        yield
    finally:
        with _LOCK:
            _IN_USE.discard(id(cache))
