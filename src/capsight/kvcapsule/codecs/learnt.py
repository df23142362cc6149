"""`LearntCodec`: what codecs that choose per image learn of a model, which is the same for all of them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from capsight.errors import OptionError
from capsight.kvcapsule.codecs.base import LayerCodec, check_ridge, take_tensors
from capsight.kvcapsule.codecs.kriging import with_nugget
from capsight.kvcapsule.codecs.moments import LayerMoments, rms
from capsight.kvcapsule.codecs.whitening import is_whitening, whitened, whitening

KEY_WEIGHT = 0.5
"""Of a key's error beside a value's, when tokens are chosen (benchmarks/ablations.py compares others)."""


class LearntCodec(LayerCodec):
    """Second moments of the tokens of a block and of the channels of a head: they serve every r.

    Buffers:
        packed: float32 `[G, N (N + 1) / 2]`, lower triangle of the regularised second moment; G = 1
            for keys and values together, G = 2 for one each.
        mean: float32 `[2, H, D]`, mean of every channel of keys and of values.
        whitening: bfloat16 `[2, H, D (D + 1) / 2]`, what whitens the channels of each KV head's keys and
            values (`capsight.kvcapsule.codecs.whitening`); that of keys times `KEY_WEIGHT`.
    """

    constants: ClassVar[Mapping[str, Any]] = {"key_weight": KEY_WEIGHT}
    packed: Tensor
    mean: Tensor
    whitening: Tensor

    def __init__(self, packed: Tensor, mean: Tensor, whitening: Tensor, block_size: int, kept: int) -> None:
        """Take what `fit` learnt or a file held (see the buffers above)."""
        super().__init__(block_size, kept)
        self.register_buffer("packed", packed)
        self.register_buffer("mean", mean)
        self.register_buffer("whitening", whitening)

    @classmethod
    def fit(
        cls, moments: LayerMoments, kept: int, *, ridge: float = 1e-2, joint: bool = True, **_: Any
    ) -> Self:
        """Solve for the codec from one layer's calibration moments.

        Args:
            moments: sums over calibration blocks.
            kept: tokens kept of each block (r).
            ridge: noise variance added to C, as a fraction of its mean variance.
            joint: one C for keys and values together, or one each (twice the bytes of C).
        """
        check_ridge(ridge)
        kinds = (moments.keys, moments.values)
        mean = torch.stack([kind.channel_mean() for kind in kinds])  # [2, H, D]
        second = [kind.about(centre[:, None]) for kind, centre in zip(kinds, mean, strict=True)]
        c = torch.stack([(heads / rms(heads)[:, None, None] ** 2).mean(0) for heads in second])
        c = with_nugget(c.mean(0, keepdim=True) if joint else c, ridge)  # [G, N, N]
        rows, cols = torch.tril_indices(moments.block_size, moments.block_size)
        keys, values = (whitening(kind.channel_covariance()) for kind in kinds)
        white = torch.stack([KEY_WEIGHT * keys, values]).bfloat16()  # [2, H, D (D + 1) / 2]
        return cls(c[:, rows, cols].float(), mean.float(), white, moments.block_size, kept)

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], shape: tuple[int, int, int], kept: int) -> Self:
        """The codec for blocks of `shape` (H, N, D) whose `state_dict()` gave `tensors`."""
        heads, block_size, head_dim = shape
        shapes = {
            "packed": (None, block_size * (block_size + 1) // 2),
            "mean": (2, heads, head_dim),
            "whitening": (2, heads, head_dim * (head_dim + 1) // 2),
        }
        packed, mean, white = take_tensors(tensors, shapes, {"whitening": torch.bfloat16})
        if len(packed) not in (1, 2):
            raise OptionError(f"tensor packed holds {len(packed)} second moments, expected 1 or 2")
        codec = cls(packed, mean, white, block_size, kept)
        if not is_whitening(white, head_dim) or torch.linalg.cholesky_ex(codec.covariance()).info.any():
            raise OptionError(
                "tensors packed and whitening are not those of positive definite second moments"
            )
        return codec

    def resized(self, kept: int) -> Self:
        """This codec with another number of kept tokens; shares the buffers."""
        return self._with(kept=kept)

    def _with(self, **options: Any) -> Self:
        """This codec with some of its options changed."""
        options = {"kept": self.kept} | options
        return type(self)(self.packed, self.mean, self.whitening, self.block_size, **options)

    def covariance(self) -> Tensor:
        """The regularised second moment: float32 `[G, N, N]`."""
        return self.unpacked(self.packed)

    def unpacked(self, packed: Tensor) -> Tensor:
        """Symmetric matrices `[..., N, N]` from their lower triangles `[..., N (N + 1) / 2]`."""
        index = _square_from_packed(self.block_size, packed.device)
        return packed[..., index].unflatten(-1, (self.block_size, self.block_size))

    @property
    def head_dim(self) -> int:
        """Channels of a head (D)."""
        return self.mean.shape[-1]

    def whitened(self, keys: Tensor, values: Tensor) -> Tensor:
        """Whitened keys and values of blocks `[M, H, N, D]`: float32 `[2, M, H, N, D]`."""
        key_mean, value_mean = self.mean[:, :, None]
        return whitened(keys - key_mean, values - value_mean, self.whitening)


@lru_cache(maxsize=8)
def _square_from_packed(size: int, device: torch.device) -> Tensor:
    """Where in a packed lower triangle the entries of a symmetric matrix lie: int64 `[N * N]`."""
    rows, cols = torch.tril_indices(size, size)
    index = torch.empty(size, size, dtype=torch.int64)
    index[rows, cols] = index[cols, rows] = torch.arange(len(rows))
    return index.flatten().to(device)
