"""The `adaptive` codec (default, ours): what to keep is chosen per image, the rest predicted from it."""

from __future__ import annotations

from typing import Any, Literal, Self

import torch
from torch import Tensor

from capsight.errors import OptionError
from capsight.kvcapsule.codecs.block import Payload
from capsight.kvcapsule.codecs.ragged import RaggedPayload
from capsight.kvcapsule.codecs.selecting import SelectingCodec
from capsight.kvcapsule.codecs.sharing import Share
from capsight.kvcapsule.kriging import Selection, prediction_weights
from capsight.kvcapsule.latent import LatentBlocks, TokenMap
from capsight.kvcapsule.moments import LayerMoments

Weights = Literal["solved", "stored"]
WEIGHTS: tuple[Weights, ...] = ("solved", "stored")
"""What may become of the prediction weights of a capsule."""


class AdaptiveCodec(SelectingCodec):
    """Rebuilds, linearly from the kept tokens of its block, every token that was not kept.

    The weights of that follow from the positions kept. "solved" solves for them whenever they are
    needed, which is smallest; "stored" keeps them in the capsule, which is fastest, and which blocks that
    share their tokens cannot have.

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
        share: Share = "block",
    ) -> None:
        """Take what `fit` learnt or a file held (see `SelectingCodec`), and what to do with weights.

        Raises:
            OptionError: `weights` is neither "solved" nor "stored", or "stored" where blocks share.
        """
        super().__init__(packed, mean, whitening, block_size, kept, share)
        if weights not in WEIGHTS:
            raise OptionError(f"weights must be one of {list(WEIGHTS)}, not {weights!r}")
        if weights == "stored" and share == "prompt":
            raise OptionError(
                "weights='stored' needs share='block'; with share='prompt' use weights='solved'"
            )
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
        share: Share = "block",
        **_: Any,
    ) -> Self:
        """Solve for the codec as `SelectingCodec` does.

        Args:
            moments: sums over calibration blocks.
            kept: tokens kept of each block (r).
            ridge: noise variance added to C, as a fraction of its mean variance.
            joint: one C for keys and values together, or one each (twice the bytes of C).
            weights: "solved" or "stored".
            share: "block" (all blocks keep r) or "prompt" (those of a prompt keep r on average).
        """
        return super().fit(moments, kept, ridge=ridge, joint=joint, share=share).with_weights(weights)

    def with_weights(self, weights: Weights) -> Self:
        """This codec with its weights "solved" or "stored"; shares the buffers."""
        return self._with(weights=weights)

    def _with(self, **options: Any) -> Self:
        return super()._with(**{"weights": self.weights} | options)

    def decode(self, payload: Payload) -> tuple[Tensor, Tensor]:
        """Predict the tokens that were not kept from those that were."""
        if isinstance(payload, RaggedPayload):
            return self._decode_ragged(payload)
        keys, values, kept = (payload.tensors[name] for name in ("keys", "values", "kept"))
        if self.kept == self.block_size:
            return keys.transpose(1, 2), values.transpose(1, 2)
        weights, mean = self._weights(payload).to(keys.dtype), self.mean.to(keys.dtype)
        first = torch.arange(len(kept), device=kept.device)[:, None] * self.block_size  # [M, 1]
        slots = (first + kept).flatten(), (first + self._others(kept)).flatten()
        return (
            _rebuild(weights[:, 0], keys, mean[0], self.block_size, slots),
            _rebuild(weights[:, -1], values, mean[1], self.block_size, slots),
        )

    def latent(self, payload: Payload) -> LatentBlocks:
        """Kept tokens as slots, and the weights that the others follow with."""
        if isinstance(payload, RaggedPayload):
            return self._latent_ragged(payload)
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
        kept = payload.tensors["kept"]
        return prediction_weights(self.covariance(), kept.long(), self._others(kept))

    def _others(self, kept: Tensor) -> Tensor:
        """The positions that are not in `kept` `[M, r]`, ascending: int64 `[M, N - r]`."""
        return self._others_first(kept)[:, : self.block_size - self.kept]

    def _others_first(self, kept: Tensor) -> Tensor:
        """The positions that are not in `kept` `[M, r]`, ascending, then those that are: int64 `[M, N]`."""
        taken = torch.zeros(len(kept), self.block_size, dtype=torch.bool, device=kept.device)
        return taken.scatter_(1, kept.long(), True).sort(dim=1, stable=True).indices

    def _decode_ragged(self, payload: RaggedPayload) -> tuple[Tensor, Tensor]:
        """Predict whole groups of blocks that keep nearly as many tokens, then put kept tokens in place."""
        x, kept = [payload.tensors[name] for name in ("keys", "values")], payload.tensors["kept"]
        blocks, covariance, mean = len(payload.tensors["counts"]), self.covariance(), self.mean.to(x[0].dtype)
        full = [each.new_empty(blocks * self.block_size, *each.shape[1:]) for each in x]
        for alike in payload.alike():
            entries, real = payload.side_by_side(alike)  # [m, R]
            fewest = int(real.sum(1).min())  # blocks that keep more predict a few kept tokens, too
            others = self._others_first(kept[entries])[:, : self.block_size - fewest]
            weights = prediction_weights(covariance, kept[entries].long(), others, real).to(mean.dtype)
            slots = (alike[:, None] * self.block_size + others).flatten()
            for kind, group in ((0, 0), (1, -1)):
                centred = (x[kind][entries] - mean[kind]).flatten(2)  # [m, R, H * D]
                found = torch.baddbmm(mean[kind].flatten(), weights[:, group], centred)
                full[kind].index_copy_(0, slots, found.view(-1, *mean.shape[1:]))
        slots = payload.slots(self.block_size)
        keys, values = (
            whole.index_copy_(0, slots, each).unflatten(0, (blocks, self.block_size)).transpose(1, 2)
            for whole, each in zip(full, x, strict=True)
        )
        return keys, values

    def _latent_ragged(self, payload: RaggedPayload) -> LatentBlocks:
        """All tokens as rebuilt ones; those that were kept have weight one for their slot, and zero else."""
        entries, real = payload.side_by_side()  # [M, R]
        kept, covariance = payload.tensors["kept"][entries].long(), self.covariance()
        weights = covariance.new_zeros(len(kept), len(covariance), self.block_size, kept.shape[1])
        for alike in payload.alike():
            some = int(real[alike].sum(1).max())
            found = prediction_weights(covariance, kept[alike, :some], real=real[alike, :some])
            weights[alike, :, :, :some] = found  # [m, G, N, R']
        position = torch.arange(self.block_size, device=kept.device)
        own = (kept[:, None] == position[:, None]) & real[:, None]  # [M, N, R]
        weights = torch.where(own.any(2)[:, None, :, None], own[:, None].to(weights), weights)
        rest = 1 - weights.sum(-1)
        maps = [TokenMap(False, weights[:, g], rest[:, g], self.mean[i]) for i, g in ((0, 0), (1, -1))]
        keys, values = (payload.tensors[name][entries] for name in ("keys", "values"))
        return LatentBlocks(keys, values, *maps)


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
