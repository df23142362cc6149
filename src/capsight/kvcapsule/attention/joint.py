"""Attention over latents that all layers share, without rebuilding a key or a value.

A token has one latent z; a layer's keys before RoPE are `mean + U z`, and its values likewise. Each axis of
rotary positions (time, height, width) turns channels of its own, so the score of a query over a token at
(t, h, w) is z . (u_t + u_h + u_w) and a constant: the query, turned back by a place on each axis and seen
through U, once for all tokens that share the place. What is gathered is one latent for each query, and goes
through the values' basis last. Derived for this package; the sums are exact.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from capsight.kvcapsule.attention.latents import LatentTokens, LayerBasis, PackedLatents
from capsight.kvcapsule.attention.native.build import library
from capsight.kvcapsule.attention.native.decode import room_for
from capsight.kvcapsule.attention.native.source import FORMATS, Sources


@dataclass(frozen=True, eq=False)
class JointTokens:
    """All latents of a batch, to be attended to in one layer.

    Attributes:
        latents: what is stored.
        tokens: where they belong.
        basis: the layer's.
    """

    latents: PackedLatents
    tokens: LatentTokens
    basis: LayerBasis

    def __getstate__(self) -> dict[str, Any]:
        """Without addresses: a copy lies elsewhere."""
        return {name: value for name, value in self.__dict__.items() if name != "_native"}

    def attend(self, query: Tensor, exact: Sources, scaling: float) -> tuple[Tensor, Tensor]:
        """Attention over exact tokens and over latents, natively; see `plain_joint_attention`.

        Latents are read as they are stored, a few tokens at a time. For few queries of a KV head, where
        `native.supports` them.

        Args:
            query: `[B, Hq, Q, D]`, after RoPE; Hq is a multiple of H.
            exact: other tokens of the same rows and heads.
            scaling: factor of the scores.

        Returns:
            `[B, Hq, Q, D]` in the dtype of `query`, and float32 `[B, Hq, Q]`, the log of the normaliser.
        """
        query = query.contiguous()
        out, lse = torch.empty_like(query), torch.empty(query.shape[:3], dtype=torch.float32)
        self._call(query, exact, scaling, out, lse)
        return out, lse

    def attended(self, query: Tensor, exact: Sources, scaling: float) -> Tensor:
        """`attend` as models take it, `[B, Q, Hq, D]`, and without the normaliser."""
        out, by_token = room_for(query)
        self._call(query.contiguous(), exact, scaling, out, None)
        return by_token

    @property
    def address(self) -> int:
        """Where native code finds this; valid as long as this is."""
        return ctypes.addressof(self._native[0])

    def _call(self, query: Tensor, exact: Sources, scaling: float, out: Tensor, lse: Tensor | None) -> None:
        batch, query_heads, count = query.shape[:3]
        heads = self.basis.key_mean.shape[0]
        library().capsight_joint(
            self.address,
            query.data_ptr(),
            FORMATS[query.dtype],
            batch,
            heads,
            query_heads // heads * count,
            exact.native,
            len(exact.each),
            scaling,
            torch.get_num_threads(),
            out.data_ptr(),
            None if lse is None else lse.data_ptr(),
        )

    @cached_property
    def _native(self) -> tuple[Any, tuple[Any, ...]]:
        """This as native code has it, and what has to live as long."""
        latents, basis = self.latents, self.basis
        codes, scales = latents.codes.contiguous(), latents.scales.contiguous()
        tables, alive = _tables(self.tokens, basis.key_mean.shape[1])
        made = _Joint.from_buffer_copy(tables)
        made.codes, made.scales, made.width = codes.data_ptr(), scales.data_ptr(), codes.shape[1]
        made.counts_of_bits[:], made.points[:] = latents.counts, latents.points
        for name in _OF_LAYER:
            setattr(made, name, getattr(basis, name).data_ptr())
        return made, (codes, scales, alive)


_OF_LAYER = tuple(f"{kind}_{name}" for name in ("axes", "steps", "mean") for kind in ("key", "value"))


def _tables(tokens: LatentTokens, size: int) -> tuple[_Joint, Any]:
    """What all layers have alike, for `size` channels, made once; and what has to live as long, too."""
    known: tuple[_Joint, Any] | None = tokens.__dict__.get("_joint")
    if known is None or known[0].channels != size:
        (places, order, cosines, sines), frequencies = tables = tokens.native(size), tokens.frequencies
        made = _Joint(
            starts=tokens.starts.data_ptr(),
            counts=tokens.counts.data_ptr(),
            places=places.data_ptr(),
            tokens=places.shape[1],
            sizes=_three(ctypes.c_int64, map(len, cosines)),
            order=_addresses(order),
            pairs=_three(ctypes.c_int64, map(len, frequencies)),
            widths=_three(ctypes.c_int64, map(len, order)),
            cosines=_addresses(cosines),
            sines=_addresses(sines),
            channels=size,
            spots=_addresses(tokens.tables[3]),
            frequencies=_addresses(frequencies),
        )
        known = tokens.__dict__["_joint"] = made, tables
    return known


class _Joint(ctypes.Structure):
    """`Joint` of `joint.h`."""

    _fields_ = (
        ("codes", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("width", ctypes.c_int64),
        ("counts_of_bits", ctypes.c_int64 * 3),
        ("points", ctypes.c_float * 2),
        ("starts", ctypes.c_void_p),
        ("counts", ctypes.c_void_p),
        ("places", ctypes.c_void_p),
        ("tokens", ctypes.c_int64),
        ("sizes", ctypes.c_int64 * 3),
        ("order", ctypes.c_void_p * 3),
        ("pairs", ctypes.c_int64 * 3),
        ("widths", ctypes.c_int64 * 3),
        ("cosines", ctypes.c_void_p * 3),
        ("sines", ctypes.c_void_p * 3),
        *((name, ctypes.c_void_p) for name in _OF_LAYER),
        ("channels", ctypes.c_int64),
        ("spots", ctypes.c_void_p * 3),
        ("frequencies", ctypes.c_void_p * 3),
    )


def _three(kind: Any, numbers: Iterable[int]) -> Any:
    return (kind * 3)(*numbers)


def _addresses(tensors: Sequence[Tensor]) -> Any:
    return _three(ctypes.c_void_p, (x.data_ptr() for x in tensors))
