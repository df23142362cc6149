"""`Parts`: the named tensors of a saved cache, each checked when it is taken."""

from __future__ import annotations

import torch
from torch import Tensor

from capsight.errors import CapsuleFileError

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
Shape = tuple[int | None, ...]


class Parts:
    """Named tensors, checked when they are taken; keys and values all have one dtype."""

    def __init__(self, tensors: dict[str, Tensor], batch: int) -> None:
        """Take over `tensors`, those of a cache of `batch` rows."""
        self._tensors, self.batch = tensors, batch
        self.dtype: torch.dtype | None = None

    def peek(self, name: str) -> Tensor:
        """The tensor called `name`, left where it is."""
        if name not in self._tensors:
            raise CapsuleFileError(f"the saved cache has no tensor {name}; save it again")
        return self._tensors[name]

    def take(self, name: str, shape: Shape, dtype: torch.dtype | None = None) -> Tensor:
        """The tensor called `name`; None in a shape stands for any size, no dtype for that of the cache."""
        tensor = self.peek(name)
        if dtype is None:
            self.dtype = dtype = self.dtype or (tensor.dtype if tensor.dtype in DTYPES else DTYPES[0])
        fits = len(shape) == tensor.ndim and all(
            n in (None, m) for n, m in zip(shape, tensor.shape, strict=True)
        )
        if not fits or tensor.dtype != dtype:
            raise CapsuleFileError(
                f"tensor {name} of the saved cache is {tensor.dtype} {tuple(tensor.shape)}, expected {dtype} "
                f"{shape}; save it again"
            )
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise CapsuleFileError(
                f"tensor {name} of the saved cache holds NaN or infinite values; save it again"
            )
        return self._tensors.pop(name)
