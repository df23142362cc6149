"""Steps of a compiled graph: what a layer does with a new token, cache and attention, is one operation of it.

The graph sees the token, and a number that names the cache, in a tensor. What grows from step to step lies
behind the operation, so nothing of it is guarded: one graph serves every step, and every cache.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor

_CACHES: WeakValueDictionary[int, Any] = WeakValueDictionary()
_NUMBERS = count(1)

Attention = Callable[[Any, Tensor, Tensor, Tensor, int, float], Tensor]
"""Stores a new token in a layer of a cache and attends: cache, query, key, value, layer, factor of scores."""


class Handed(NamedTuple):
    """What a cache returns in the place of keys while a graph is made.

    Attributes:
        key: `[B, H, 1, D]`, the new token's.
        value: likewise.
        number: int64 `[]`, of the cache.
        layer: where the token goes.
    """

    key: Tensor
    value: Tensor
    number: Tensor
    layer: int

    def attend(self, query: Tensor, scaling: float) -> Tensor:
        """Store the token, and attend to all: `[B, 1, Hq, D]` of queries `[B, Hq, 1, D]`."""
        given = query, self.key, self.value, self.number, self.layer, scaling
        attended: Tensor = torch.ops.capsight.step(*given)
        return attended


@dataclass(eq=False, slots=True)
class Steps:
    """What a cache has while its steps may be compiled.

    Attributes:
        attention: of a new token, for what native code cannot do alone.
        number: int64 `[]`, of the cache; the operations find it by that.
        mask: what hides tokens from the step, as attention takes it; None if nothing does.
    """

    attention: Attention
    number: Tensor = field(default_factory=lambda: torch.tensor(next(_NUMBERS)))
    mask: Tensor | None = None

    @classmethod
    def of(cls, cache: Any, attention: Attention) -> Steps:
        """Those of `cache`."""
        steps = cls(attention)
        _CACHES[int(steps.number)] = cache
        return steps

    @property
    def seen(self) -> Tensor:
        """Tokens per row that the cache holds, as a graph sees it: int64 `[]`."""
        held: Tensor = torch.ops.capsight.seen(self.number)
        return held

    def hand_over(self, key: Tensor, value: Tensor, layer: int) -> tuple[Any, Tensor]:
        """What an update `[B, H, 1, D]` of a layer returns while a graph is made."""
        return Handed(key, value, self.number, layer), value


def _step(query: Tensor, key: Tensor, value: Tensor, number: Tensor, layer: int, scaling: float) -> Tensor:
    cache = _CACHES[int(number)]
    out: Tensor | None = cache.step(query, key, value, layer, scaling)
    if out is None:
        out = cache.steps.attention(cache, query, key, value, layer, scaling)
    return out.contiguous()


def _fake_step(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> Tensor:
    batch, heads, tokens = query.shape[:3]
    return query.new_empty(batch, tokens, heads, value.shape[3])


def _seen(number: Tensor) -> Tensor:
    return torch.tensor(_CACHES[int(number)].get_seq_length())


_OPERATIONS = torch.library.Library("capsight", "FRAGMENT")
_OPERATIONS.define(
    "step(Tensor query, Tensor key, Tensor value, Tensor number, int layer, float scaling) -> Tensor"
)
_OPERATIONS.define("seen(Tensor number) -> Tensor")
_OPERATIONS.impl("step", _step, "CPU")
_OPERATIONS.impl("seen", _seen, "CPU")
torch.library.register_fake("capsight::step", _fake_step, lib=_OPERATIONS)
torch.library.register_fake("capsight::seen", torch.empty_like, lib=_OPERATIONS)
