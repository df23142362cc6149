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


def grown(room: Tensor, held: int, new: int) -> Tensor:
    """A buffer `[2, B, R, H, D]` that begins with the `held` tokens of `room` and has room for `new` more.

    It is `room` itself where that has room for them.
    """
    # A buffer made in inference mode may not be written outside of it.
    frozen = room.is_inference() and not torch.is_inference_mode_enabled()
    wanted = held + new
    if wanted <= room.shape[2] and not frozen:
        return room
    larger = room.new_empty(*room.shape[:2], wanted + max(_LEAST, wanted // 8), *room.shape[3:])
    larger[:, :, :held] = room[:, :, :held]
    return larger
