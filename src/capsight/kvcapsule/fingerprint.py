"""Cheap hashes that tell one capsule or set of images from another."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

_PIXELS = 1 << 16


def tensors_fingerprint(tensors: Mapping[str, Tensor], about: Any) -> str:
    """Hash of whole tensors, their names, dtypes and shapes, and of JSON-ready values about them."""
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu()
        digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def pixels_fingerprint(pixels: Sequence[Tensor]) -> str:
    """Hash of numbers sampled from pixel tensors; "" if there are none.

    The numbers are rounded to bfloat16 first, so that casting inputs to that dtype changes nothing.
    """
    digest = hashlib.sha256()
    for tensor in pixels:
        step = max(tensor.numel() // _PIXELS, 1)
        digest.update(f"{tuple(tensor.shape)}".encode())
        digest.update(_bytes(tensor.detach().flatten()[::step].to("cpu", torch.bfloat16)))
    return digest.hexdigest() if pixels else ""


def _bytes(tensor: Tensor) -> memoryview:
    """The memory of a tensor on the CPU."""
    return tensor.contiguous().flatten().view(torch.uint8).numpy().data
