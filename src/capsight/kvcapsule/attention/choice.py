"""Whether the GPU kernel can be used for some tensors, and what became of trying."""

from __future__ import annotations

import importlib.util
import warnings
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from capsight.errors import CapsightError

WIDEST = 256
"""Channels of a head that the kernel holds on chip."""


class LatentKernelError(CapsightError):
    """The GPU kernel of attention over capsules cannot be compiled here; use `plain.attend`."""


class Kind(NamedTuple):
    """What the kernel is compiled for, as far as it decides whether that works."""

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    slots: int

    @classmethod
    def of(cls, query: Tensor, slots: Tensor) -> Kind:
        """That of queries `[B, Hq, Q, D]` over slots `[M, r, H, D]`."""
        return cls(query.device, query.dtype, query.shape[-1], slots.shape[1])


_failed: dict[Kind, str] = {}
"""Kinds that did not compile in this process, and why: they are not tried again."""


def reason_against(kind: Kind) -> str:
    """Why the kernel cannot be used; empty where it can."""
    return _failed.get(kind) or missing(*kind[:3])


def give_up(kind: Kind, error: LatentKernelError) -> str:
    """Remember that the kernel does not compile; the reason."""
    return _failed.setdefault(kind, str(error))


@cache
def missing(device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """What keeps the kernel from being tried; empty if nothing does."""
    if device.type != "cuda":
        return f"it runs on CUDA devices, not on {device.type}"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install 'capsight[gpu]')"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"it knows no {dtype}"
    if head_dim > WIDEST:
        return f"heads have {head_dim} channels, more than {WIDEST}"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} is older than compute capability 8.0"
    return ""


@cache
def warn(reason: str) -> None:
    """Say, once for each reason, that torch does what the kernel should have done."""
    warnings.warn(
        f"attention over capsules runs without its GPU kernel, more slowly: {reason}",
        RuntimeWarning,
        stacklevel=3,
    )
