"""`Noted`: what is known of caches, with where their rows have gone since."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Generic, TypeVar
from weakref import WeakKeyDictionary

from capsight.kvcapsule import CapsuleCache
from capsight.kvcapsule.cache.row_order import RowOrder

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Note(Generic[T]):
    """What was noted of one cache.

    Attributes:
        value: as it was then.
        order: where the rows of then are now; None for stock caches, whose rows cannot be followed.
    """

    value: T
    order: RowOrder | None


class Noted(Generic[T]):
    """A note per cache, for as long as the cache is there."""

    def __init__(self) -> None:
        """Know no cache."""
        self._notes: WeakKeyDictionary[Any, Note[T]] = WeakKeyDictionary()

    def put(self, cache: Any, value: T) -> None:
        """Note something of the rows that `cache` has now, in place of what was noted before."""
        order = cache.follow_rows() if isinstance(cache, CapsuleCache) else None
        self._notes[cache] = Note(value, order)

    def get(self, cache: Any) -> Note[T] | None:
        """What was noted of `cache`; None if nothing was, or there is no cache."""
        return None if cache is None else self._notes.get(cache)
