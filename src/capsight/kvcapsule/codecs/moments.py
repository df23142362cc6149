"""Streaming second moments of calibration KV blocks along the token axis, one accumulator per layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from capsight.errors import CalibrationError


@dataclass(slots=True)
class TokenMoments:
    """Sums over calibration blocks of one kind, keys or values; a block is `[H, N, D]`.

    Attributes:
        second: float64 `[H, N, N]`, sum of x x^T over blocks and channels, per KV head.
        channels: float64 `[H, D, D]`, sum of x^T x over blocks and tokens, per KV head.
        total: float64 `[H, N, D]`, sum of the blocks.
        blocks: number of blocks (M).
    """

    second: Tensor
    channels: Tensor
    total: Tensor
    blocks: int = 0

    @classmethod
    def zeros(cls, heads: int, block_size: int, head_dim: int) -> TokenMoments:
        """Empty sums."""
        sizes = (block_size, block_size), (head_dim, head_dim), (block_size, head_dim)
        second, channels, total = (torch.zeros(heads, *size, dtype=torch.float64) for size in sizes)
        return cls(second, channels, total)

    def add(self, x: Tensor) -> None:
        """Add blocks `x` `[M, H, N, D]`."""
        samples = x.double().permute(1, 2, 0, 3).flatten(2)  # [H, N, M * D]
        self.second += (samples @ samples.mT).cpu()
        tokens = x.double().transpose(0, 1).flatten(1, 2)  # [H, M * N, D]
        self.channels += (tokens.mT @ tokens).cpu()
        self.total += x.double().sum(0).cpu()
        self.blocks += x.shape[0]

    def merge(self, other: TokenMoments) -> None:
        """Add the sums of another accumulator."""
        self.second += other.second
        self.channels += other.channels
        self.total += other.total
        self.blocks += other.blocks

    def channel_mean(self) -> Tensor:
        """Mean of every channel over blocks and tokens: float64 `[H, D]`."""
        return self.total.mean(1) / self.blocks

    def channel_covariance(self) -> Tensor:
        """Covariance of the channels over blocks and tokens: float64 `[H, D, D]`."""
        mean = self.channel_mean()
        tokens = self.blocks * self.total.shape[1]
        return self.channels / tokens - mean[:, :, None] * mean[:, None, :]

    def token_mean(self) -> Tensor:
        """Mean of every token position over blocks, heads and channels: float64 `[N]`."""
        return self.total.mean((0, 2)) / self.blocks

    def about(self, mean: Tensor) -> Tensor:
        """Second moment `[H, N, N]` of tokens about a mean that broadcasts to `[H, N, D]`; float64."""
        mean = mean.expand_as(self.total)  # [H, N, D]
        cross = self.total @ mean.mT  # [H, N, N]
        centred = self.second - cross - cross.mT + self.blocks * (mean @ mean.mT)
        return centred / (self.blocks * mean.shape[-1])


def rms(second: Tensor) -> Tensor:
    """Root mean square `[H]` of heads with second moments `[H, N, N]`; 1 for a head that is all zero."""
    mean_square = second.diagonal(dim1=1, dim2=2).mean(1)
    return torch.where(mean_square > 0, mean_square, 1.0).sqrt()


class LayerMoments:
    """Second moments of one layer's keys and values, in float64, from one pass over calibration blocks.

    Nothing but the sums is kept: `2 * H * (N^2 + N D + D^2) * 8` bytes however many blocks are added.
    """

    def __init__(self, heads: int, block_size: int, head_dim: int) -> None:
        """Start with empty sums for blocks `[H, N, D]`."""
        self.shape = (heads, block_size, head_dim)
        self.keys = TokenMoments.zeros(*self.shape)
        self.values = TokenMoments.zeros(*self.shape)

    @property
    def block_size(self) -> int:
        """Tokens in a block (N)."""
        return self.shape[1]

    @property
    def blocks(self) -> int:
        """Blocks added so far (M)."""
        return self.keys.blocks

    def update(self, keys: Tensor, values: Tensor) -> None:
        """Add the blocks of one prompt.

        Args:
            keys: `[M, H, N, D]`, any float dtype.
            values: `[M, H, N, D]`.

        Raises:
            CalibrationError: the shape is not that of this layer, or a number is NaN or infinite.
        """
        for name, x in (("keys", keys), ("values", values)):
            if x.ndim != 4 or x.shape[1:] != self.shape or x.shape[0] != keys.shape[0]:
                raise CalibrationError(
                    f"calibration {name} have shape {tuple(x.shape)}, expected (M, heads, tokens, channels) "
                    f"with {self.shape} after M"
                )
            if not torch.isfinite(x).all():
                raise CalibrationError(
                    f"calibration {name} hold NaN or infinite values; run the model in float32 or bfloat16 "
                    "and check that the samples are what its processor makes"
                )
        self.keys.add(keys)
        self.values.add(values)

    def merge(self, other: LayerMoments) -> None:
        """Add another accumulator's sums (the all-reduce of a distributed fit).

        Raises:
            CalibrationError: the two are of different shapes.
        """
        if self.shape != other.shape:
            raise CalibrationError(
                f"cannot merge moments of blocks {other.shape} into those of blocks {self.shape}"
            )
        self.keys.merge(other.keys)
        self.values.merge(other.values)
