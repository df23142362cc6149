"""Latents to bits in native code; `codecs.levels` has it in torch."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from capsight.kvcapsule.attention.native.build import library


def pack(latents: Tensor, counts: tuple[int, int, int], group: int, middle: float) -> tuple[Tensor, Tensor]:
    """Codes and scales of latents, where `native.supports` them.

    Args:
        latents: float32 `[T, >= R]`, numbers of a token side by side.
        counts: coordinates in 8, 4 and 2 bits, R in all; multiples of `group`.
        group: coordinates that share a scale, as the native code has it.
        middle: between the two sizes that two bits stand for, in scales.

    Returns:
        uint8 `[T, C]` and float16 `[T, R / group]`.
    """
    eight, four, two = counts
    codes = latents.new_empty(len(latents), eight + four // 2 + two // 4, dtype=torch.uint8)
    scales = latents.new_empty(len(latents), sum(counts) // group, dtype=torch.float16)
    library().capsight_pack(
        latents.data_ptr(),
        latents.stride(0),
        len(latents),
        (ctypes.c_int64 * 3)(*counts),
        middle,
        torch.get_num_threads(),
        codes.data_ptr(),
        scales.data_ptr(),
    )
    return codes, scales
