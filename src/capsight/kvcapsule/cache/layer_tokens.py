"""`LayerTokens`: all that a layer stores, left to attention as it lies in memory."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor

from capsight.kvcapsule.attention import latent_attention
from capsight.kvcapsule.attention.joint import JointTokens
from capsight.kvcapsule.attention.latents import LatentTokens
from capsight.kvcapsule.attention.native import Source, decode_attention, supports
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
        self.codec, self.payload, self.rows, self.packed, self.room = codec, payload, rows, packed, room

    def are(self, payload: Payload, rows: ExactRows, packed: Tensor, room: Tensor) -> bool:
        """Whether these are the very same."""
        same = self.payload is payload and self.rows is rows
        return same and self.packed is packed and self.room is room

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
        if self.places is not None:
            return self._with_latents(query, held, mask, scaling)
        query_heads, count = query.shape[1:3]
        heads, exact = self.packed.shape[2], self.rows.width + held
        if query_heads // heads * count <= _FEW and self._kept is not None and supports(query):
            bias = self.rows.bias(mask, count, exact, query_heads)
            self._tail.counts.fill_(held)
            exact_sources = [self._packed, self._tail] if bias is None else self._biased(bias)
            return decode_attention(query, [self._kept, *exact_sources], scaling)[0].transpose(1, 2)
        keys, values = (
            self.rows.lined_up(self.packed[kind], self.room[kind, :, :held], scratch, role).transpose(1, 2)
            for kind, role in enumerate(("keys", "values"))
        )
        shown = self.rows.mask(mask, count, exact)
        blocks = self.codec.latent(self.payload)
        return latent_attention(query, keys, values, blocks, self.rows.blocks, shown, scaling)

    def _with_latents(self, query: Tensor, held: int, mask: Tensor | None, scaling: float) -> Tensor:
        """Attention over exact tokens and over latents."""
        count, exact = query.shape[2], self.rows.width + held
        bias = self.rows.bias(mask, count, exact, query.shape[1])
        self._tail.counts.fill_(held)
        exact_sources = [self._packed, self._tail] if bias is None else self._biased(bias)
        return self._joint.attend(query, exact_sources, scaling)[0].transpose(1, 2)

    @cached_property
    def _kept(self) -> Source | None:
        return self.codec.source(self.payload, self.rows.blocks, self.room.shape[1])

    @cached_property
    def _joint(self) -> JointTokens:
        assert self.places is not None
        return JointTokens(self.codec.stored_latents(self.payload), self.places, self.codec.basis)

    @cached_property
    def _packed(self) -> Source:
        starts, counts = self.rows.pieces(self.packed.shape[2])
        return Source(self.packed[0], self.packed[1], starts, counts)

    @cached_property
    def _tail(self) -> Source:
        batch, size, heads = self.room.shape[1:4]
        starts = (torch.arange(batch) * size)[:, None].expand(-1, heads).contiguous()
        keys, values = self.room.flatten(1, 2)  # [B * R, H, D]
        return Source(keys, values, starts, torch.zeros_like(starts))

    def _biased(self, bias: Tensor) -> list[Source]:
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
        return [
            replace(self._packed, bias=bias, bias_starts=of_packed.contiguous(), bias_stride=stride),
            replace(self._tail, bias=bias, bias_starts=(first + width).contiguous(), bias_stride=stride),
        ]
