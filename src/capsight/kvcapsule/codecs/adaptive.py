"""The `adaptive` codec (default, ours): what to keep is chosen per image, the rest predicted from it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor

from capsight.errors import OptionError
from capsight.kvcapsule.codecs.base import LayerCodec, check_ridge, index_dtype, take_tensors
from capsight.kvcapsule.codecs.block import Payload
from capsight.kvcapsule.kriging import greedy_selection, prediction_weights, with_nugget
from capsight.kvcapsule.moments import LayerMoments, rms


class AdaptiveCodec(LayerCodec):
    """Keeps, per block, the r tokens that the other kept ones predict worst; rebuilds the rest linearly.

    One set of kept tokens serves the keys and values of all KV heads of a block. What is learnt
    is second moments of tokens only, so the same module serves every r.

    Buffers:
        packed: float32 `[G, N (N + 1) / 2]`, lower triangle of the regularised second moment; G = 1
            for keys and values together, G = 2 for one each.
        mean: float32 `[2, H, D]`, mean of every channel of keys and of values.
        scale: float32 `[2, H]`, root mean square about the mean of each KV head's keys and values.

    Capsules:
        keys, values: `[M, r, H, D]`, kept tokens in order of position.
        kept: `[M, r]`, their positions in the block (uint8 up to N = 256).
    """

    name = "adaptive"
    packed: Tensor
    mean: Tensor
    scale: Tensor

    def __init__(self, packed: Tensor, mean: Tensor, scale: Tensor, block_size: int, kept: int) -> None:
        """Take what `fit` learnt or a file held; see the buffers above."""
        super().__init__(block_size, kept)
        self.register_buffer("packed", packed)
        self.register_buffer("mean", mean)
        self.register_buffer("scale", scale)

    @classmethod
    def fit(
        cls, moments: LayerMoments, kept: int, *, ridge: float = 1e-2, joint: bool = False, **_: Any
    ) -> Self:
        """Solve for the codec from one layer's calibration moments.

        Args:
            moments: sums over calibration blocks.
            kept: tokens kept of each block (r).
            ridge: noise variance added to C, as a fraction of its mean variance.
            joint: one C for keys and values together (half the module bytes) in place of one each.
        """
        check_ridge(ridge)
        kinds = (moments.keys, moments.values)
        mean = torch.stack([kind.channel_mean() for kind in kinds])  # [2, H, D]
        second = [kind.about(centre[:, None]) for kind, centre in zip(kinds, mean, strict=True)]
        scale = torch.stack([rms(heads) for heads in second])  # [2, H]
        c = torch.stack(
            [(heads / s[:, None, None] ** 2).mean(0) for heads, s in zip(second, scale, strict=True)]
        )
        c = with_nugget(c.mean(0, keepdim=True) if joint else c, ridge)  # [G, N, N]
        rows, cols = torch.tril_indices(moments.block_size, moments.block_size)
        return cls(c[:, rows, cols].float(), mean.float(), scale.float(), moments.block_size, kept)

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], shape: tuple[int, int, int], kept: int) -> Self:
        """The codec for blocks of `shape` (H, N, D) whose `state_dict()` gave `tensors`."""
        heads, block_size, head_dim = shape
        shapes = {
            "packed": (None, block_size * (block_size + 1) // 2),
            "mean": (2, heads, head_dim),
            "scale": (2, heads),
        }
        packed, mean, scale = take_tensors(tensors, shapes, {})
        if len(packed) not in (1, 2):
            raise OptionError(f"tensor packed holds {len(packed)} second moments, expected 1 or 2")
        codec = cls(packed, mean, scale, block_size, kept)
        if (scale <= 0).any() or torch.linalg.cholesky_ex(codec.covariance()).info.any():
            raise OptionError("tensors packed and scale are not those of a positive definite second moment")
        return codec

    def resized(self, kept: int) -> Self:
        """This codec with another number of kept tokens; shares the buffers."""
        return type(self)(self.packed, self.mean, self.scale, self.block_size, kept)

    def covariance(self) -> Tensor:
        """The regularised second moment: float32 `[G, N, N]`."""
        n = self.block_size
        rows, cols = torch.tril_indices(n, n, device=self.packed.device)
        full = self.packed.new_empty(len(self.packed), n, n)
        full[:, rows, cols] = self.packed
        full[:, cols, rows] = self.packed
        return full

    def encode(self, keys: Tensor, values: Tensor) -> Payload:
        """Choose the kept tokens of blocks `[M, H, N, D]` and copy them."""
        kept = self.select(keys, values)  # [M, r]
        index = kept[:, :, None, None]
        return Payload(
            {
                "keys": keys.transpose(1, 2).take_along_dim(index, 1),
                "values": values.transpose(1, 2).take_along_dim(index, 1),
                "kept": kept.to(index_dtype(self.block_size)),
            }
        )

    def select(self, keys: Tensor, values: Tensor) -> Tensor:
        """Positions to keep of blocks `[M, H, N, D]`: int64 `[M, r]`, ascending."""
        if self.kept == self.block_size:
            return torch.arange(self.block_size, device=keys.device).expand(keys.shape[0], -1)
        gram = torch.stack([self._gram(0, keys), self._gram(1, values)], 1)  # [M, 2, N, N]
        covariance = self.covariance()
        return greedy_selection(
            covariance, gram.sum(1, keepdim=True) if len(covariance) == 1 else gram, self.kept
        )

    def decode(self, payload: Payload) -> tuple[Tensor, Tensor]:
        """Predict all tokens from the kept ones, then put the kept ones themselves in their places."""
        keys, values, kept = (
            payload.tensors["keys"],
            payload.tensors["values"],
            payload.tensors["kept"].long(),
        )
        if self.kept == self.block_size:
            return keys.transpose(1, 2), values.transpose(1, 2)
        weights = prediction_weights(self.covariance(), kept).to(keys.dtype)  # [M, G, N, r]
        mean = self.mean.to(keys.dtype)
        return _rebuild(weights[:, 0], keys, kept, mean[0]), _rebuild(weights[:, -1], values, kept, mean[1])

    def _gram(self, kind: int, x: Tensor) -> Tensor:
        """Token Gram matrices `[M, N, N]` of normalised blocks `[M, H, N, D]`, in float32."""
        x = (x.transpose(1, 2).float() - self.mean[kind]) / self.scale[kind][:, None]  # [M, N, H, D]
        x = x.flatten(2)
        return x @ x.mT

    def payload_nbytes(self, heads: int, head_dim: int, itemsize: int) -> int:
        """Bytes of one block's capsule: the kept tokens and their positions."""
        return self.kept * (2 * heads * head_dim * itemsize + index_dtype(self.block_size).itemsize)


def _rebuild(weights: Tensor, x: Tensor, kept: Tensor, mean: Tensor) -> Tensor:
    """Blocks `[M, H, N, D]` from weights `[M, N, r]`, kept tokens `[M, r, H, D]`, mean `[H, D]`."""
    blocks, size, _ = weights.shape
    full = torch.bmm(weights, (x - mean).flatten(2)).view(blocks * size, *mean.shape)
    full += mean
    slots = torch.arange(blocks, device=kept.device)[:, None] * size + kept  # [M, r]
    full.index_copy_(0, slots.flatten(), x.flatten(0, 1))
    return full.view(blocks, size, *mean.shape).transpose(1, 2)
