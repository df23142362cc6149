"""A decode step of one layer in one native call, prepared once: the new token is stored and attended with."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from capsight.kvcapsule.attention.native.build import library
from capsight.kvcapsule.attention.native.source import FORMATS, Sources


class OneToken:
    """Steps of some sources, of which the last one has room behind each piece, and of latents.

    Little of Python runs in a call, since nothing of it is in the processor's caches by then: the weights of
    a layer went through them.
    """

    __slots__ = ("_address", "_alive", "_asked", "_dtype", "_like", "_room", "_run", "_stored")

    def __init__(self, query: Tensor, room: Sequence[int], sources: Sources, joint: Any = None) -> None:
        """Prepare steps like the next one, where `supports` takes its queries.

        Args:
            query: `[B, Hq, 1, D]`.
            room: shape of the room of the last source, `[B, R, H, D]`, in the dtype of `query`.
            sources: what is read.
            joint: address of the latents as native code has them, or None.
        """
        assert sources.each[-1].keys.dtype == query.dtype
        batch, self._room, heads, channels = room
        self._asked, self._stored, self._dtype = query.numel(), batch * heads * channels, query.dtype
        self._like = torch.empty((batch, 1, query.shape[1], channels), dtype=query.dtype)
        self._run = library().capsight_step
        count = query.shape[1] // heads
        made = _Step(
            joint=joint,
            sources=ctypes.addressof(sources.native),
            source_count=len(sources.each),
            batch=batch,
            heads=heads,
            count=count,
            channels=channels,
            format=FORMATS[query.dtype],
        )
        self._address, self._alive = ctypes.addressof(made), (made, sources)

    def __call__(
        self, query: Tensor, keys: Tensor, values: Tensor, held: int, scaling: float
    ) -> Tensor | None:
        """Store a token behind the last source and attend to all, as `append` and `attended` do.

        Args:
            query: as prepared for.
            keys: `[B, H, 1, D]`, in the dtype of `query`.
            values: likewise.
            held: tokens of the last source, of every row.
            scaling: factor of the scores.

        Returns:
            `[B, 1, Hq, D]`; None, with nothing done, where something is of another size or dtype, or there
            is no room left.
        """
        dtype = self._dtype
        if held >= self._room:
            return None
        if query.dtype is not dtype or keys.dtype is not dtype or values.dtype is not dtype:
            return None
        if query.numel() != self._asked or keys.numel() != self._stored or values.numel() != self._stored:
            return None
        query, keys, values = query.contiguous(), keys.contiguous(), values.contiguous()
        out = torch.empty_like(self._like)
        given = query.data_ptr(), keys.data_ptr(), values.data_ptr()
        self._run(self._address, *given, scaling, torch.get_num_threads(), out.data_ptr())
        return out


class _Step(ctypes.Structure):
    """`Step` of `step.cpp`."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("joint", "sources")),
        *((name, ctypes.c_int64) for name in ("source_count", "batch", "heads", "count", "channels")),
        ("format", ctypes.c_int32),
    )
