"""`TokenMlp`: a small network along the token axis, added to what a linear map of the kept tokens gives."""

from __future__ import annotations

from typing import NamedTuple, Self

import torch
from torch import Tensor
from torch.nn.functional import gelu


class TokenMlp(NamedTuple):
    """Two layers with a GELU between them; every channel of every head is a sample of its own.

    That keys are rebuilt by an MLP is reported of KVCapsule (arXiv 2605.16439) by secondary sources;
    its shape, and that it corrects a linear map, are this project's own.

    Attributes:
        w_in: float32 `[W, r]`, from r kept tokens to W hidden units.
        bias: float32 `[W]`.
        w_out: float32 `[T, W]`, from hidden units to the T tokens that are rebuilt.
    """

    w_in: Tensor
    bias: Tensor
    w_out: Tensor

    @classmethod
    def zero(cls, kept: int, rebuilt: int, width: int, seed: int = 0) -> Self:
        """A network whose output is zero, ready to be trained.

        Args:
            kept: tokens it reads (r).
            rebuilt: tokens it corrects (T).
            width: hidden units (W).
            seed: of its first layer.
        """
        generator = torch.Generator().manual_seed(seed)
        w_in = torch.randn(width, kept, generator=generator) / kept**0.5
        return cls(w_in, torch.zeros(width), torch.zeros(rebuilt, width))

    def __call__(self, tokens: Tensor) -> Tensor:
        """The correction `[..., T, C]` for kept tokens `[..., r, C]`, in their dtype."""
        w_in, bias, w_out = (weights.to(tokens.dtype) for weights in self)
        return w_out @ gelu(w_in @ tokens + bias[:, None])

    def scaled(self, scale: float) -> Self:
        """The network `x -> scale * self(x / scale)`: for tokens of another magnitude."""
        return type(self)(self.w_in / scale, self.bias, self.w_out * scale)
