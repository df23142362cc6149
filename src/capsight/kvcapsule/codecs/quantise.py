"""Numbers in 8 or 4 bits with a step and an offset per group, as KIVI stores KV (arXiv 2402.02750).

Plain tensors and not those of optimum-quanto: a capsule's tensors are indexed, joined and written to
safetensors, and a tensor subclass of quanto 0.2.7 becomes a dense float tensor when it is indexed or
joined, and cannot be written.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from capsight.errors import OptionError

BITS = (8, 4)
"""Bit widths that can be stored."""


class Quantised(NamedTuple):
    """Numbers x of a tensor `[..., C]` as `low + step * level`, for groups along one axis.

    Attributes:
        levels: uint8 `[..., C]`; in 4 bits `[..., ceil(C / 2)]`, channel c in the low half of byte c
            and channel c + ceil(C / 2) in its high half.
        step: distance of two levels, in the dtype of x and with its shape, the groups' axis being 1.
        low: smallest number of each group, likewise.
    """

    levels: Tensor
    step: Tensor
    low: Tensor


def quantise(x: Tensor, bits: int, axis: int) -> Quantised:
    """Quantise in groups that each span the whole of one axis.

    Each number is off by half a step at most, and by its rounding to the dtype (KIVI's scheme, the
    offset being the smallest number itself, so that it is exact).

    Args:
        x: float `[..., C]`, below the largest number of its dtype by 1 % or more, and below 1e38. A group
            that holds NaN or infinity comes back as NaN.
        bits: 8 or 4.
        axis: the axis that a group spans.

    Raises:
        OptionError: `bits` is neither.
    """
    check_bits(bits)
    top, work = 2**bits - 1, torch.promote_types(x.dtype, torch.float32)
    low, high = x.amin(axis, keepdim=True), x.amax(axis, keepdim=True)
    step = ((high.to(work) - low.to(work)) / top).to(x.dtype)
    step = torch.where(step == 0, torch.ones_like(step), step)  # constant groups: all levels are 0
    levels = ((x.to(work) - low) / step).round_().clamp_(0, top).to(torch.uint8)
    return Quantised(_packed(levels) if bits == 4 else levels, step, low)


def dequantise(q: Quantised, bits: int, channels: int) -> Tensor:
    """The numbers again: `[..., C]` in the dtype of the steps.

    Args:
        q: what `quantise` gave.
        bits: 8 or 4, as given then.
        channels: size of the last axis (C).
    """
    levels = _unpacked(q.levels, channels) if bits == 4 else q.levels
    work = torch.promote_types(q.step.dtype, torch.float32)
    return levels.to(work).mul_(q.step).add_(q.low).to(q.step.dtype)


def check_bits(bits: int) -> None:
    """Refuse a bit width that cannot be stored.

    Raises:
        OptionError: `bits` is neither 8 nor 4.
    """
    if bits not in BITS:
        raise OptionError(f"capsules can be stored in 8 or 4 bits, not {bits}")


def _packed(levels: Tensor) -> Tensor:
    """Two levels to a byte: uint8 `[..., C]` -> `[..., ceil(C / 2)]`."""
    half = (levels.shape[-1] + 1) // 2
    packed = levels[..., :half].clone()
    packed[..., : levels.shape[-1] - half] |= levels[..., half:] << 4
    return packed


def _unpacked(packed: Tensor, channels: int) -> Tensor:
    """One level to a byte: uint8 `[..., ceil(C / 2)]` -> `[..., C]`."""
    return torch.cat([packed & 15, packed >> 4], -1)[..., :channels]
