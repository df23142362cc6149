"""The `adaptive` codec (ours): what to keep is chosen per image, the rest predicted from it."""

from __future__ import annotations

from typing import Any, Literal, Self

import torch
from torch import Tensor

from capsight.errors import OptionError
from capsight.kvcapsule.attention import LatentBlocks, TokenMap
from capsight.kvcapsule.codecs.block import Payload
from capsight.kvcapsule.codecs.kriging import Selection, prediction_weights
from capsight.kvcapsule.codecs.moments import LayerMoments
from capsight.kvcapsule.codecs.selecting import SelectingCodec

Weights = Literal["solved", "stored"]
WEIGHTS: tuple[Weights, ...] = ("solved", "stored")
"""What may become of the prediction weights of a capsule."""


class AdaptiveCodec(SelectingCodec):
    """Rebuilds, linearly from the kept tokens of its block, every token that was not kept.

    The weights of that follow from the positions kept. "solved" solves for them whenever they are
    needed, which is smallest; "stored" keeps them in the capsule, which is fastest.

    Capsules, beside those of `SelectingCodec`:
        weights: `[M, G, N - r, r]` with "stored", of the other tokens in order of position, in the
            dtype of the blocks if it has 16 bits, else float16.
    """

    name = "adaptive"

    def __init__(
        self,
        packed: Tensor,
        mean: Tensor,
        whitening: Tensor,
        block_size: int,
        kept: int,
        weights: Weights = "solved",
    ) -> None:
        """Take what `fit` learnt or a file held (see `LearntCodec`), and what to do with weights.

        Raises:
            OptionError: `weights` is neither "solved" nor "stored".
        """
        super().__init__(packed, mean, whitening, block_size, kept)
        if weights not in WEIGHTS:
            raise OptionError(f"weights must be one of {list(WEIGHTS)}, not {weights!r}")
        self.weights: Weights = weights

    @classmethod
    def fit(
        cls,
        moments: LayerMoments,
        kept: int,
        *,
        ridge: float = 1e-2,
        joint: bool = True,
        weights: Weights = "solved",
        **_: Any,
    ) -> Self:
        """Solve for the codec as `LearntCodec` does.

        Args:
            moments: sums over calibration blocks.
            kept: tokens kept of each block (r).
            ridge: noise variance added to C, as a fraction of its mean variance.
            joint: one C for keys and values together, or one each (twice the bytes of C).
            weights: "solved" or "stored".
        """
        return super().fit(moments, kept, ridge=ridge, joint=joint).with_weights(weights)

    def with_weights(self, weights: Weights) -> Self:
        """This codec with its weights "solved" or "stored"; shares the buffers."""
        return self._with(weights=weights)

    def _with(self, **options: Any) -> Self:
        return super()._with(**{"weights": self.weights} | options)

    def decode(self, payload: Payload) -> tuple[Tensor, Tensor]:
        """Predict the tokens that were not kept from those that were."""
        keys, values, positions = (payload.tensors[name] for name in ("keys", "values", "kept"))
        if self.kept == self.block_size:
            return keys.transpose(1, 2), values.transpose(1, 2)
        weights, mean = self._weights(payload).to(keys.dtype), self.mean.to(keys.dtype)
        first = torch.arange(len(positions), device=positions.device)[:, None] * self.block_size  # [M, 1]
        slots = (first + positions).flatten(), (first + self._others(positions)).flatten()
        return (
            _rebuild(weights[:, 0], keys, mean[0], self.block_size, slots),
            _rebuild(weights[:, -1], values, mean[1], self.block_size, slots),
        )

    def latent(self, payload: Payload) -> LatentBlocks:
        """Kept tokens as slots, and the weights that the others follow with."""
        keys, values = payload.tensors["keys"], payload.tensors["values"]
        if self.kept == self.block_size:
            return LatentBlocks(keys, values, TokenMap(), TokenMap())
        weights = self._weights(payload).float()  # [M, G, T, r]
        rest = 1 - weights.sum(-1)  # [M, G, T]
        maps = [TokenMap(True, weights[:, g], rest[:, g], self.mean[i]) for i, g in ((0, 0), (1, -1))]
        return LatentBlocks(keys, values, *maps)

    def payload_nbytes(self, heads: int, head_dim: int, itemsize: int) -> int:
        """Bytes of one block's capsule: the kept tokens, their positions, and weights if stored."""
        nbytes = super().payload_nbytes(heads, head_dim, itemsize)
        if self.weights == "stored":
            nbytes += len(self.packed) * (self.block_size - self.kept) * self.kept * min(itemsize, 2)
        return nbytes

    def _pack(self, keys: Tensor, values: Tensor, selection: Selection) -> Payload:
        payload = super()._pack(keys, values, selection)
        if self.weights == "stored" and self.kept < self.block_size:
            others = self._others(payload.tensors["kept"])[None]  # [1, M, T]
            weights = selection.weights(others)[0]  # [M, G, T, r]
            ascending = selection.order[0].argsort(1)[:, None, None].expand_as(weights)
            weights = weights.gather(3, ascending)
            payload.tensors["weights"] = weights.to(keys.dtype if keys.dtype.itemsize <= 2 else torch.float16)
        return payload

    def _weights(self, payload: Payload) -> Tensor:
        """Weights of the tokens that were not kept: `[M, G, N - r, r]`."""
        if "weights" in payload.tensors:
            return payload.tensors["weights"]
        positions = payload.tensors["kept"]
        return prediction_weights(self.covariance(), positions.long(), self._others(positions))

    def _others(self, positions: Tensor) -> Tensor:
        """The positions that are not in `positions` `[M, r]`, ascending: int64 `[M, N - r]`."""
        taken = torch.zeros(len(positions), self.block_size, dtype=torch.bool, device=positions.device)
        order = taken.scatter_(1, positions.long(), True).sort(dim=1, stable=True).indices
        return order[:, : self.block_size - self.kept]


def _rebuild(weights: Tensor, x: Tensor, mean: Tensor, size: int, slots: tuple[Tensor, Tensor]) -> Tensor:
    """Blocks `[M, H, N, D]` of N = `size` tokens.

    Args:
        weights: `[M, T, r]`, of the tokens that were not kept.
        x: `[M, r, H, D]`, kept tokens.
        mean: `[H, D]`.
        size: tokens in a block.
        slots: int64 `[M * r]` and `[M * T]`, where the kept and the other tokens go in `[M * N]`.
    """
    full = x.new_empty(len(x) * size, *mean.shape)
    others = torch.baddbmm(mean.flatten(), weights, (x - mean).flatten(2))  # [M, T, H * D]
    full.index_copy_(0, slots[0], x.flatten(0, 1))
    full.index_copy_(0, slots[1], others.view(-1, *mean.shape))
    return full.view(len(x), size, *mean.shape).transpose(1, 2)
