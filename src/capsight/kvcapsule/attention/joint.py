"""Attention over latents that all layers share, without rebuilding a key or a value.

A token has one latent z; a layer's keys before RoPE are `mean + U z`, and its values likewise. Each axis of
rotary positions (time, height, width) turns channels of its own, so the score of a query over a token at
(t, h, w) is z . (u_t + u_h + u_w) and a constant: the query, turned back by a place on each axis and seen
through U, once for all tokens that share the place. What is gathered is one latent for each query, and goes
through the values' basis last. Derived for this package; the sums are exact.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from capsight.kvcapsule.attention.latents import LatentTokens, LayerBasis, PackedLatents
from capsight.kvcapsule.attention.native.build import library
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
        batch, query_heads, count, _ = query.shape
        heads = self.basis.key_mean.shape[0]
        out, lse = torch.empty_like(query), torch.empty(query.shape[:3], dtype=torch.float32)
        library().capsight_joint(
            self._native[0],
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
            lse.data_ptr(),
        )
        return out, lse

    @cached_property
    def _native(self) -> tuple[Any, tuple[Tensor, ...]]:
        """This as native code has it, and what has to live as long."""
        latents, basis = self.latents, self.basis
        size = basis.key_mean.shape[1]
        places, order, cosines, sines = self.tokens.native(size)
        codes, scales = latents.codes.contiguous(), latents.scales.contiguous()
        turning, pairs = self.tokens.turning, self.tokens.pairs
        frequencies = [turning.frequencies[of_axis].abs().double() for of_axis in pairs]
        made = _Joint(
            codes=codes.data_ptr(),
            scales=scales.data_ptr(),
            width=codes.shape[1],
            counts_of_bits=(ctypes.c_int64 * 3)(*latents.counts),
            points=(ctypes.c_float * 2)(*latents.points),
            starts=self.tokens.starts.data_ptr(),
            counts=self.tokens.counts.data_ptr(),
            places=places.data_ptr(),
            tokens=places.shape[1],
            sizes=(ctypes.c_int64 * 3)(*map(len, cosines)),
            order=_addresses(order),
            pairs=(ctypes.c_int64 * 3)(*map(len, pairs)),
            widths=(ctypes.c_int64 * 3)(*map(len, order)),
            cosines=_addresses(cosines),
            sines=_addresses(sines),
            key_axes=basis.key_axes.data_ptr(),
            value_axes=basis.value_axes.data_ptr(),
            key_steps=basis.key_steps.data_ptr(),
            value_steps=basis.value_steps.data_ptr(),
            key_mean=basis.key_mean.data_ptr(),
            value_mean=basis.value_mean.data_ptr(),
            channels=size,
            spots=_addresses(self.tokens.tables[3]),
            frequencies=_addresses(frequencies),
        )
        return ctypes.byref(made), (codes, scales, *frequencies)


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
        *(
            (f"{kind}_{name}", ctypes.c_void_p)
            for name in ("axes", "steps", "mean")
            for kind in ("key", "value")
        ),
        ("channels", ctypes.c_int64),
        ("spots", ctypes.c_void_p * 3),
        ("frequencies", ctypes.c_void_p * 3),
    )


def _addresses(tensors: Sequence[Tensor]) -> Any:
    return (ctypes.c_void_p * 3)(*(x.data_ptr() for x in tensors))
