"""`Scratch`: the one buffer that every layer's full-length keys and values are rebuilt into."""

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
