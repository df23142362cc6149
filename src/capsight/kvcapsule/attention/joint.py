"""Attention over latents that all layers share, without rebuilding a key or a value.

A token has one latent z; a layer's keys before RoPE are `mean + U z`, and its values likewise. Each axis of
rotary positions (time, height, width) turns channels of its own, so the score of a query over a token at
(t, h, w) is z . (u_t + u_h + u_w) and a constant: the query, turned back by a place on each axis and seen
through U, once for all tokens that share the place. What is gathered is one latent for each query, and goes
through the values' basis last. Derived for this package; the sums are exact.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from capsight.kvcapsule.attention.native.build import library

LANES = 16
"""Numbers that native code takes at a time at most: latents are a multiple of them."""


class Turning(Protocol):
    """How keys are turned: `Rotary` of the codecs is one."""

    frequencies: Tensor  # float64 [P], radians per position
    axes: Tensor  # int64 [P], which of t, h, w turns a pair
    interleaved: bool  # pairs are channels (2 i, 2 i + 1); else (i, i + P)
    scaling: float


@dataclass(frozen=True, eq=False)
class LatentTokens:
    """Places of T tokens, the same for all layers, and how they turn keys.

    Attributes:
        starts: int64 `[B]`, first token of each row.
        counts: int64 `[B]`, how many it has.
        positions: int64 `[3, T]`.
        turning: how keys are turned.
    """

    starts: Tensor
    counts: Tensor
    positions: Tensor
    turning: Turning

    @cached_property
    def order(self) -> tuple[Tensor, list[int]]:
        """Channels by axis, first halves of pairs first: int64 `[2 P]`, and pairs of each axis."""
        axes, parts, sizes = self.turning.axes, [], []
        for axis in range(3):
            pairs = (axes == axis).nonzero().flatten()
            inter = self.turning.interleaved
            parts += [2 * pairs, 2 * pairs + 1] if inter else [pairs, pairs + len(axes)]
            sizes.append(len(pairs))
        return torch.cat(parts), sizes

    @cached_property
    def tables(self) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Which of the places of each axis a token has, int32 `[3, T]`; their cosines and sines, scaled."""
        which, cosines, sines = [], [], []
        for axis, own in enumerate(self.positions):
            places, index = own.unique(return_inverse=True)
            angles = places[:, None] * self.turning.frequencies[self.turning.axes == axis]
            which.append(index.int())
            cosines.append((angles.cos() * self.turning.scaling).float().contiguous())
            sines.append((angles.sin() * self.turning.scaling).float().contiguous())
        return torch.stack(which), cosines, sines

    def channels(self, size: int) -> Tensor:
        """All of so many channels in the order of `order`, those that are not turned last: int64 `[D]`."""
        order, _ = self.order
        return torch.cat((order, torch.arange(len(order), size)))


@dataclass(frozen=True, eq=False)
class LayerBasis:
    """What makes one layer's keys and values of latents.

    Attributes:
        key_axes: `[H, D, R]`.
        key_mean: `[H, D]`.
        value_axes: `[H, D, R]`.
        value_mean: `[H, D]`.
    """

    key_axes: Tensor
    key_mean: Tensor
    value_axes: Tensor
    value_mean: Tensor

    def native(self, channels: Tensor) -> tuple[Tensor, ...]:
        """Keys' axes and mean, channels in this order; values' `[H, R, V]` and `[H, V]`; all float32."""
        if "_native" not in self.__dict__ or not torch.equal(self.__dict__["_native"][0], channels):
            pad = -self.value_mean.shape[1] % LANES
            made = (
                self.key_axes[:, channels].float().contiguous(),
                self.key_mean[:, channels].float().contiguous(),
                torch.nn.functional.pad(self.value_axes.float().mT, (0, pad)).contiguous(),
                torch.nn.functional.pad(self.value_mean.float(), (0, pad)).contiguous(),
            )
            self.__dict__["_native"] = channels, made
        return self.__dict__["_native"][1]


def joint_attention(
    query: Tensor, latents: Tensor, tokens: LatentTokens, basis: LayerBasis, scaling: float
) -> tuple[Tensor, Tensor]:
    """Attention over the latents of each row, natively; see `plain_joint_attention`.

    For few queries of a KV head, where `native.supports` them, and R is a multiple of `LANES`.
    """
    batch, query_heads, count, size = query.shape
    heads = basis.key_mean.shape[0]
    each = query_heads // heads * count
    channels = tokens.channels(size)
    places, cosines, sines = tokens.tables
    given = basis.native(channels)
    q = (query.float() * scaling)[..., channels].contiguous()
    value_size = given[3].shape[1]
    out, lse = q.new_empty(batch, heads, each, value_size), q.new_empty(batch, heads, each)
    assert latents.dtype == torch.float32
    assert latents.is_contiguous()
    call = _Joint(
        latents=latents.data_ptr(),
        rank=latents.shape[1],
        starts=tokens.starts.data_ptr(),
        counts=tokens.counts.data_ptr(),
        places=places.data_ptr(),
        tokens=places.shape[1],
        sizes=_three(ctypes.c_int64, [len(x) for x in cosines]),
        cosines=_three(ctypes.c_void_p, [x.data_ptr() for x in cosines]),
        sines=_three(ctypes.c_void_p, [x.data_ptr() for x in sines]),
        pairs=_three(ctypes.c_int64, tokens.order[1]),
        fixed=size - len(tokens.order[0]),
        key_axes=given[0].data_ptr(),
        key_mean=given[1].data_ptr(),
        value_axes=given[2].data_ptr(),
        value_mean=given[3].data_ptr(),
        channels=size,
        value_channels=value_size,
    )
    library().capsight_joint(
        ctypes.byref(call),
        ctypes.c_void_p(q.data_ptr()),
        *map(ctypes.c_int64, (batch, heads, each, torch.get_num_threads())),
        ctypes.c_void_p(out.data_ptr()),
        ctypes.c_void_p(lse.data_ptr()),
    )
    out = out[..., : basis.value_mean.shape[1]].reshape(*query.shape[:3], -1)
    return out, lse.view(query.shape[:3])


def plain_joint_attention(
    query: Tensor, latents: Tensor, tokens: LatentTokens, basis: LayerBasis, scaling: float
) -> tuple[Tensor, Tensor]:
    """Attention over keys and values that are rebuilt, one row at a time.

    Args:
        query: `[B, Hq, Q, D]`, after RoPE; Hq is a multiple of H.
        latents: `[T, R]`.
        tokens: where they belong, T in all.
        basis: the layer's.
        scaling: factor of the scores.

    Returns:
        float32 `[B, Hq, Q, D]`, 0 where a row has no token, and the log of the normaliser `[B, Hq, Q]`, minus
        infinity there; to be added up with attention over exact tokens.
    """
    work = torch.promote_types(latents.dtype, torch.float32)
    turning, group = tokens.turning, query.shape[1] // len(basis.key_mean)
    out = query.new_zeros(query.shape[:3] + basis.value_mean.shape[1:], dtype=work)
    lse = query.new_full(query.shape[:3], -torch.inf, dtype=work)
    for row, (start, count) in enumerate(zip(tokens.starts.tolist(), tokens.counts.tolist(), strict=True)):
        if not count:
            continue
        own = slice(start, start + count)
        z = latents[own].to(work)
        keys, values = (  # [H, n, D]
            (z @ axes.to(work).mT) + mean[:, None].to(work)
            for axes, mean in ((basis.key_axes, basis.key_mean), (basis.value_axes, basis.value_mean))
        )
        pairs = torch.arange(len(turning.axes))
        first, second = (2 * pairs, 2 * pairs + 1) if turning.interleaved else (pairs, pairs + len(pairs))
        angles = tokens.positions[:, own].double()[turning.axes].T * turning.frequencies  # [n, P]
        cos, sin = ((x * turning.scaling).to(work) for x in (angles.cos(), angles.sin()))
        a, b = keys[..., first], keys[..., second]
        keys = keys.index_copy(2, first, a * cos - b * sin).index_copy(2, second, b * cos + a * sin)
        keys, values = (x.repeat_interleave(group, 0) for x in (keys, values))
        scores = scaling * query[row].to(work) @ keys.mT  # [Hq, Q, n]
        lse[row], out[row] = scores.logsumexp(-1), scores.softmax(-1) @ values
    return out, lse


class _Joint(ctypes.Structure):
    """`Joint` of `joint.cpp`."""

    _fields_ = (
        ("latents", ctypes.c_void_p),
        ("rank", ctypes.c_int64),
        ("starts", ctypes.c_void_p),
        ("counts", ctypes.c_void_p),
        ("places", ctypes.c_void_p),
        ("tokens", ctypes.c_int64),
        ("sizes", ctypes.c_int64 * 3),
        ("cosines", ctypes.c_void_p * 3),
        ("sines", ctypes.c_void_p * 3),
        ("pairs", ctypes.c_int64 * 3),
        ("fixed", ctypes.c_int64),
        ("key_axes", ctypes.c_void_p),
        ("key_mean", ctypes.c_void_p),
        ("value_axes", ctypes.c_void_p),
        ("value_mean", ctypes.c_void_p),
        ("channels", ctypes.c_int64),
        ("value_channels", ctypes.c_int64),
    )


def _three(kind: Any, values: list[int]) -> Any:
    return (kind * 3)(*values)
