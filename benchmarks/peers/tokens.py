"""What scores of peers are made of: queries, keys and values of one layer, turned by RoPE or not."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from capsight.baselines.seen import Seen
from capsight.kvcapsule.codecs.rotary import Rotary

AHEAD = 512
"""Coming positions over which rotations are averaged, as in kvpress."""


@dataclass(frozen=True, eq=False)
class Tokens:
    """One layer's tokens of one prompt, float32.

    Attributes:
        query: `[Hq, S, D]`, after RoPE.
        key: `[H, S, D]`, after RoPE.
        value: `[H, S, D]`.
        positions: int64 `[3, S]`.
        rotary: how positions turn keys and queries.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    positions: Tensor
    rotary: Rotary

    @classmethod
    def of(cls, seen: Seen, value: Tensor, positions: Tensor, rotary: Rotary) -> Tokens:
        """The tokens of a prefill of one prompt."""
        if seen.key.shape[0] != 1:
            raise ValueError("peers score one prompt at a time")
        return cls(seen.query[0].float(), seen.key[0].float(), value[0].float(), positions, rotary)

    @property
    def group(self) -> int:
        """Query heads of a KV head (G)."""
        return len(self.query) // len(self.key)

    @cached_property
    def plain_key(self) -> Tensor:
        """Keys before RoPE, `[H, S, D]`."""
        return self.rotary.unturn(self.key, *self.rotary.tables(self.positions))

    @cached_property
    def plain_query(self) -> Tensor:
        """Queries before RoPE, `[Hq, S, D]`."""
        return self.rotary.unturn(self.query, *self.rotary.tables(self.positions))

    def ahead(self, x: Tensor) -> Tensor:
        """`[..., D]` turned by the mean rotation of the `AHEAD` text positions that follow the prompt."""
        first = int(self.positions.max()) + 1
        tables = self.rotary.tables(torch.arange(first, first + AHEAD).expand(3, -1))
        return self.rotary.turn(x[..., None, :], *(t.mean(0, keepdim=True) for t in tables))[..., 0, :]

    def by_query_head(self, x: Tensor) -> Tensor:
        """`[H, ...]` of KV heads for every query head: `[Hq, ...]`."""
        return x.repeat_interleave(self.group, 0)

    def by_key_head(self, scores: Tensor) -> Tensor:
        """Mean `[H, S]` of the scores `[Hq, S]` of a KV head's query heads."""
        return scores.unflatten(0, (-1, self.group)).mean(1)
