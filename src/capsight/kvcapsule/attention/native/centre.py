"""What layers of joint latents project, in one pass over keys and values; `JointCodec` has it in torch."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from capsight.kvcapsule.attention.native.build import library
from capsight.kvcapsule.attention.native.source import FORMATS


def centre(
    keys: Tensor,
    values: Tensor,
    tables: tuple[Tensor, Tensor],
    interleaved: bool,
    mean: Tensor,
    weight: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """W (x - mean) of turned keys and of values; where `native.supports` the keys.

    Args:
        keys: `[T, H, D]`, float32, bfloat16 or float16, after RoPE.
        values: `[T, H, D]`, likewise.
        tables: cosines and sines, float32 `[T, P]` each, that keys are turned by.
        interleaved: pairs are channels (2 i, 2 i + 1); else (i, i + P).
        mean: float32 `[2, H, D]`, contiguous.
        weight: float32 `[2]`, contiguous.
        dtype: of the result: float32 or bfloat16.

    Returns:
        `[T, 2 H D]`, and the sum of its squares, float32 `[]`.
    """
    keys, values, cosines, sines = (x.contiguous() for x in (keys, values.to(keys.dtype), *tables))
    tokens, heads, channels = keys.shape
    out, energy = keys.new_empty(tokens, 2 * heads * channels, dtype=dtype), ctypes.c_double()
    library().capsight_centre(
        keys.data_ptr(),
        values.data_ptr(),
        FORMATS[keys.dtype],
        tokens,
        heads,
        channels,
        cosines.data_ptr(),
        sines.data_ptr(),
        cosines.shape[1],
        interleaved,
        mean.data_ptr(),
        weight.data_ptr(),
        torch.get_num_threads(),
        out.data_ptr(),
        FORMATS[dtype],
        ctypes.byref(energy),
    )
    return out, torch.tensor(energy.value, dtype=torch.float32)
