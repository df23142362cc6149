"""The `static` codec: fixed positions and maps, the plainest reading of the paper (arXiv 2605.16439).

That keys are kept selectively and values go through sequence-level PCA is reported by secondary
sources; the selection rule and the linear key map are this project's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor

from capsight.errors import OptionError
from capsight.kvcapsule.attention import LatentBlocks, TokenMap
from capsight.kvcapsule.codecs.base import LayerCodec, check_kept, check_ridge, take_tensors
from capsight.kvcapsule.codecs.block import Payload
from capsight.kvcapsule.codecs.kriging import pivoted_cholesky, prediction_weights, with_nugget
from capsight.kvcapsule.codecs.moments import LayerMoments, rms


class StaticCodec(LayerCodec):
    """Keys: r fixed positions are kept, the rest is a linear map of them. Values: PCA along the token axis.

    Buffers:
        kept_index: int64 `[r]`, positions of the kept keys, ascending.
        key_map: float32 `[N, r]`, ridge map from kept keys to all keys.
        value_mean: float32 `[N]`, mean over heads, channels and samples.
        value_basis: float32 `[N, r]`, orthonormal columns, largest variance first.

    Capsules:
        keys: `[M, r, H, D]`, kept keys.
        latent: `[M, r, H, D]`, values' coordinates in the basis (values themselves where r = N).
    """

    name = "static"
    kept_index: Tensor
    key_map: Tensor
    value_mean: Tensor
    value_basis: Tensor

    def __init__(self, kept_index: Tensor, key_map: Tensor, value_mean: Tensor, value_basis: Tensor) -> None:
        """Take what `fit` learnt or a file held; see the buffers above."""
        super().__init__(*key_map.shape)
        self.register_buffer("kept_index", kept_index)
        self.register_buffer("key_map", key_map)
        self.register_buffer("value_mean", value_mean)
        self.register_buffer("value_basis", value_basis)

    @classmethod
    def fit(cls, moments: LayerMoments, kept: int, *, ridge: float = 1e-2, **_: Any) -> Self:
        """Solve for the codec from one layer's calibration moments.

        Args:
            moments: sums over calibration blocks.
            kept: keys and principal components kept of each block (r).
            ridge: noise variance added to the keys' second moment, as a fraction of its mean variance.
        """
        check_kept(kept, moments.block_size)
        check_ridge(ridge)
        heads = moments.keys.about(torch.zeros(1, dtype=torch.float64))  # [H, N, N]
        c = with_nugget((heads / rms(heads)[:, None, None] ** 2).mean(0), ridge)  # [N, N]
        index = pivoted_cholesky(c, kept)
        key_map = prediction_weights(c[None], index[None])[0, 0]  # [N, r]
        mean = moments.values.token_mean()  # [N]
        covariance = moments.values.about(mean[:, None]).mean(0)
        basis = torch.linalg.eigh(covariance).eigenvectors.flip(1)[:, :kept]  # [N, r]
        return cls(index, key_map.float(), mean.float(), basis.float().contiguous())

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], shape: tuple[int, int, int], kept: int) -> Self:
        """The codec for blocks of `shape` (H, N, D) whose `state_dict()` gave `tensors`."""
        block_size = shape[1]
        check_kept(kept, block_size)
        wide = (block_size, kept)
        shapes = {"kept_index": (kept,), "key_map": wide, "value_mean": (block_size,), "value_basis": wide}
        index, *rest = take_tensors(tensors, shapes, {"kept_index": torch.int64})
        if index[0] < 0 or index[-1] >= block_size or (index.diff() <= 0).any():
            raise OptionError(f"kept_index does not ascend within 0..{block_size - 1}")
        return cls(index, *rest)

    def encode(self, keys: Tensor, values: Tensor) -> Payload:
        """Copy the kept keys of blocks `[M, H, N, D]` and project the values."""
        keys, values = keys.transpose(1, 2), values.transpose(1, 2)  # [M, N, H, D]
        if self.kept == self.block_size:
            return Payload({"keys": keys.contiguous(), "latent": values.contiguous()})
        centred = values.float() - self.value_mean[:, None, None]
        latent = (self.value_basis.mT @ centred.flatten(2)).view(-1, self.kept, *values.shape[2:])
        return Payload({"keys": keys[:, self.kept_index], "latent": latent.to(values.dtype)})

    def decode(self, payload: Payload) -> tuple[Tensor, Tensor]:
        """Map the kept keys to all keys, keeping theirs; expand the values."""
        kept_keys, latent = payload.tensors["keys"], payload.tensors["latent"]  # [M, r, H, D]
        if self.kept == self.block_size:
            return kept_keys.transpose(1, 2), latent.transpose(1, 2)
        shape = (-1, self.block_size, *kept_keys.shape[2:])
        keys = self.rebuilt_keys(kept_keys.flatten(2)).view(shape)
        keys[:, self.kept_index] = kept_keys
        values = (self.value_basis.to(latent.dtype) @ latent.flatten(2)).view(shape)
        values += self.value_mean.to(latent.dtype)[:, None, None]
        return keys.transpose(1, 2), values.transpose(1, 2)

    def rebuilt_keys(self, kept_keys: Tensor) -> Tensor:
        """All keys `[M, N, C]` from the kept ones `[M, r, C]`; in their own places these go unused."""
        return self.key_map.to(kept_keys.dtype) @ kept_keys

    def latent(self, payload: Payload) -> LatentBlocks:
        """Kept keys and value coordinates as slots; the kept tokens come first."""
        keys, latent = payload.tensors["keys"], payload.tensors["latent"]
        if self.kept == self.block_size:
            return LatentBlocks(keys, latent, TokenMap(), TokenMap())
        is_kept = torch.zeros(self.block_size, dtype=torch.bool, device=keys.device)
        is_kept[self.kept_index] = True
        order = is_kept.sort(stable=True, descending=True).indices  # [N]
        values = TokenMap(
            copied=False,
            weights=self.value_basis[order][None],
            rest=self.value_mean[order][None],
            mean=self.value_mean.new_ones(latent.shape[2:]),
        )
        return LatentBlocks(keys, latent, TokenMap(weights=self.key_map[order[self.kept :]][None]), values)

    def payload_nbytes(self, heads: int, head_dim: int, itemsize: int) -> int:
        """Bytes of one block's capsule: kept keys and value coordinates."""
        return 2 * self.kept * heads * head_dim * itemsize
