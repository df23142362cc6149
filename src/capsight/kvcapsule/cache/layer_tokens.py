"""`LayerTokens`: all that a layer stores, left to attention as it lies in memory."""

from __future__ import annotations

from copy import copy
from dataclasses import replace
from functools import cached_property, lru_cache
from typing import Self

import torch
from torch import Tensor

from capsight.kvcapsule.attention import latent_attention
from capsight.kvcapsule.attention.joint import JointTokens
from capsight.kvcapsule.attention.latents import LatentTokens
from capsight.kvcapsule.attention.native import OneToken, Source, Sources, append, attended, supports
from capsight.kvcapsule.cache.buffers import Scratch
from capsight.kvcapsule.cache.exact_rows import ExactRows
from capsight.kvcapsule.codecs import BlockCodec, Payload

_FEW = 32
"""Queries of a KV head that native attention takes: more are better multiplied at once."""


class LayerTokens:
    """Capsules, packed exact tokens, and the tail; good for every step in which only the tail grows.

    Where few queries ask for kept tokens, native code reads everything where it lies. Elsewhere the exact
    tokens are lined up, and torch or a GPU kernel attends to them and to the capsules.
    """

    def __init__(
        self,
        codec: BlockCodec,
        payload: Payload,
        rows: ExactRows,
        packed: Tensor,
        room: Tensor,
        places: LatentTokens | None = None,
    ) -> None:
        """Take them.

        Args:
            codec: what made the capsules.
            payload: the capsules.
            rows: where exact tokens lie in their rows.
            packed: exact keys and values `[2, E, H, D]`.
            room: `[2, B, R, H, D]`, which begins with the tail.
            places: of latents that all layers share, where the codec stores such.
        """
        self.places = places
        self._counted = -1  # tokens of the tail that `_tail` says there are
        self._again: OneToken | None = None  # what does a step like the last one
        self.codec, self.payload, self.rows, self.packed, self.room = codec, payload, rows, packed, room

    def are(self, payload: Payload, rows: ExactRows, packed: Tensor) -> bool:
        """Whether these are the very same."""
        return self.payload is payload and self.rows is rows and self.packed is packed

    def in_room(self, room: Tensor) -> Self:
        """The same with the tail in the buffer `room`: itself, where it is there already."""
        if room is self.room:
            return self
        moved = copy(self)
        for name in ("_tail", "_exact", "_all"):
            moved.__dict__.pop(name, None)
        moved.room, moved._counted, moved._again = room, -1, None
        return moved

    def append(self, keys: Tensor, values: Tensor, held: int) -> bool:
        """Put one new token behind the `held` ones of the tail natively; False where that cannot be.

        Args:
            keys: `[B, H, Q, D]`.
            values: likewise.
            held: tokens of the tail.
        """
        if keys.shape != self._one or held >= self.room.shape[2]:
            return False
        if not keys.dtype == values.dtype == self.room.dtype or not supports(keys):
            return False
        self._count(held)
        self._counted = -1  # where this is broken off, nobody knows
        append(self._tail, keys, values)
        self._counted = held + 1
        return True

    def step(
        self, query: Tensor, keys: Tensor, values: Tensor, held: int, mask: Tensor | None, scaling: float
    ) -> Tensor | None:
        """`append` and `attend` where both are native; elsewhere None, and nothing is done.

        Args:
            query: `[B, Hq, 1, D]`.
            keys: `[B, H, 1, D]`.
            values: likewise.
            held: tokens of the tail before.
            mask: see `attend`.
            scaling: factor of the scores.

        Returns:
            `[B, 1, Hq, D]`.
        """
        bias = None
        if mask is not None:
            bias = self.rows.bias(mask, 1, self.rows.width + held + 1, query.shape[1])
        if bias is None and self._again is not None and held == self._counted:
            self._counted = -1  # where this is broken off, nobody knows
            out = self._again(query, keys, values, held, scaling)
            self._counted = held if out is None else held + 1
            if out is not None:
                return out
        if not self._natively(query) or not supports(query) or not self.append(keys, values, held):
            return None
        if self._again is None and query.dtype == self.room.dtype:
            sources, joint = (self._all, None) if self.places is None else (self._exact, self._joint.address)
            self._again = OneToken(query, self.room.shape[1:], sources, joint)
        return self._attended(query, bias, scaling)

    def attend(
        self, query: Tensor, held: int, mask: Tensor | None, scaling: float, scratch: Scratch
    ) -> Tensor:
        """Softmax attention over all tokens of each row.

        Args:
            query: `[B, Hq, Q, D]`, of the last Q tokens.
            held: tokens of the tail, those included.
            mask: over all tokens, bool or additive `[B or 1, 1 or Hq, Q, S]`; None means causal.
            scaling: factor of the scores.
            scratch: where exact tokens may be lined up.

        Returns:
            `[B, Q, Hq, D]` in the dtype of `query`.
        """
        count, exact = query.shape[2], self.rows.width + held
        if self.places is not None or (self._natively(query) and supports(query)):
            self._count(held)
            return self._attended(query, self.rows.bias(mask, count, exact, query.shape[1]), scaling)
        keys, values = (
            self.rows.lined_up(self.packed[kind], self.room[kind, :, :held], scratch, role).transpose(1, 2)
            for kind, role in enumerate(("keys", "values"))
        )
        shown = self.rows.mask(mask, count, exact)
        blocks = self.codec.latent(self.payload)
        return latent_attention(query, keys, values, blocks, self.rows.blocks, shown, scaling)

    def _natively(self, query: Tensor) -> bool:
        """Whether native code reads what is kept, for so many queries."""
        few = query.shape[1] // self.packed.shape[2] * query.shape[2] <= _FEW
        return self.places is not None or (few and self._kept is not None)

    def _attended(self, query: Tensor, bias: Tensor | None, scaling: float) -> Tensor:
        """Native attention `[B, Q, Hq, D]` over everything, the exact tokens under a bias."""
        if self.places is not None:
            exact = self._exact if bias is None else Sources(self._biased(bias))
            return self._joint.attended(query, exact, scaling)
        assert self._kept is not None
        sources = self._all if bias is None else Sources((self._kept, *self._biased(bias)))
        return attended(query, sources, scaling)

    def _count(self, held: int) -> None:
        """Have `_tail` say that there are `held` tokens."""
        if self._counted != held:
            self._tail.counts.fill_(held)
            self._counted = held

    @cached_property
    def _one(self) -> torch.Size:
        """Of one new token of every row: `[B, H, 1, D]`."""
        batch, _, heads, head_dim = self.room.shape[1:]
        return torch.Size((batch, heads, 1, head_dim))

    @cached_property
    def _exact(self) -> Sources:
        return Sources((self._packed, self._tail))

    @cached_property
    def _all(self) -> Sources:
        assert self._kept is not None
        return Sources((self._kept, *self._exact.each))

    @cached_property
    def _kept(self) -> Source | None:
        return self.codec.source(self.payload, self.rows.blocks, self.room.shape[1])

    @cached_property
    def _joint(self) -> JointTokens:
        assert self.places is not None
        return JointTokens(self.codec.stored_latents(self.payload), self.places, self.codec.basis)

    @cached_property
    def _packed(self) -> Source:
        keys, values = self.packed
        return Source(keys, values, *self.rows.pieces(keys.shape[1]))

    @cached_property
    def _tail(self) -> Source:
        starts = _starts(*self.room.shape[1:4])
        keys, values = self.room.flatten(1, 2)  # [B * R, H, D]
        return Source(keys, values, starts, torch.zeros_like(starts))

    def _biased(self, bias: Tensor) -> tuple[Source, Source]:
        """The exact tokens under a bias `[B or 1, 1 or Hq, Q, X]`."""
        rows, query_heads, queries, exact = bias.shape
        batch, heads = self._tail.counts.shape
        each = queries * exact * (query_heads // heads if query_heads > 1 else 0)  # of a KV head
        first = torch.arange(heads) * each
        if rows > 1:
            first = first + torch.arange(batch)[:, None] * (query_heads * queries * exact)
        first = first.expand(batch, heads)
        stride, width = exact if query_heads > 1 else 0, self.rows.width
        of_packed = first + (width - self._packed.counts)
        return (
            replace(self._packed, bias=bias, bias_starts=of_packed.contiguous(), bias_stride=stride),
            replace(self._tail, bias=bias, bias_starts=(first + width).contiguous(), bias_stride=stride),
        )


@lru_cache
def _starts(batch: int, size: int, heads: int) -> Tensor:
    """Where rows of `size` tokens start, for each head: int64 `[B, H]`."""
    return (torch.arange(batch) * size)[:, None].expand(-1, heads).contiguous()
