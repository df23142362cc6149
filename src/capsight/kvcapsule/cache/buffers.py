"""Buffers that are used again: room for tokens that come one by one, and for what layers rebuild."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

_GROWTH = 1.25  # so that decoding token by token seldom reallocates


class Scratch:
    """Reused memory, one flat buffer per device, dtype and role; valid until the next layer needs it."""

    def __init__(self) -> None:
        """Start without any memory."""
        self._buffers: dict[tuple[torch.device, torch.dtype, str], Tensor] = {}

    def view(self, role: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """An uninitialised contiguous tensor of `shape`, with the device and dtype of `like`.

        Args:
            role: buffers of different roles ("keys", "values") are alive at the same time.
            shape: the shape wanted.
            like: gives device and dtype.
        """
        size, key = prod(shape), (like.device, like.dtype, role)
        buffer = self._buffers.get(key)
        # A buffer made in inference mode may not be written outside of it.
        frozen = buffer is not None and buffer.is_inference() and not torch.is_inference_mode_enabled()
        if buffer is None or buffer.numel() < size or frozen:
            self._buffers.pop(key, None)
            buffer = torch.empty(int(size * _GROWTH), dtype=like.dtype, device=like.device)
            self._buffers[key] = buffer
        return buffer[:size].view(shape)

    @property
    def nbytes(self) -> int:
        """Bytes held now; transient memory, not counted as KV-cache bytes."""
        return sum(buffer.nbytes for buffer in self._buffers.values())


_LEAST = 16
"""Tokens that there is room for at least, when a buffer has to grow; a long one grows by an eighth."""


class Room:
    """Writes new tokens behind those that a buffer `[2, B, R, H, D]` begins with."""

    def __init__(self) -> None:
        """Know no buffer yet."""
        self._known: tuple[Tensor, ...] = ()  # the buffer, and its keys and values as [B, H, R, D]

    def append(self, room: Tensor, held: int, keys: Tensor, values: Tensor) -> Tensor:
        """A buffer with `keys` and `values` behind the `held` tokens of `room`: itself, where that will do.

        Args:
            room: `[2, B, R, H, D]`.
            held: tokens of it.
            keys: `[B, H, Q, D]`.
            values: `[B, H, Q, D]`.
        """
        count = keys.shape[2]
        room = with_room(room, held, count)
        if not self._known or self._known[0] is not room:
            self._known = room, *room.transpose(2, 3)
        for side, new in zip(self._known[1:], (keys, values), strict=True):
            side.narrow(2, held, count).copy_(new)
        return room


def with_room(room: Tensor, held: int, count: int) -> Tensor:
    """A buffer `[2, B, R, H, D]` that begins with `held` tokens of `room` and has room for `count` more.

    It is `room` itself where that will do.
    """
    # A buffer made in inference mode may not be written outside of it.
    frozen = room.is_inference() and not torch.is_inference_mode_enabled()
    wanted = held + count
    if wanted <= room.shape[2] and not frozen:
        return room
    larger = room.new_empty(*room.shape[:2], wanted + max(_LEAST, wanted // 8), *room.shape[3:])
    larger[:, :, :held] = room[:, :, :held]
    return larger
