"""Room for tokens that come one after another, so that a step of decoding copies nothing."""

from __future__ import annotations

import torch
from torch import Tensor

_LEAST = 16
"""Tokens that there is room for at least, when a buffer has to grow; a long one grows by an eighth."""


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
