"""The `evict` codec: the control that keeps what `adaptive` keeps and rebuilds nothing."""

from __future__ import annotations

import torch
from torch import Tensor

from capsight.kvcapsule.attention import BlockRows, LatentBlocks, TokenMap
from capsight.kvcapsule.attention.native import Source, Steps
from capsight.kvcapsule.codecs.block import Payload
from capsight.kvcapsule.codecs.selecting import SelectingCodec


class EvictCodec(SelectingCodec):
    """Same fit, selection and capsules as `adaptive`; the tokens not kept are gone.

    Decoding leaves zeros in their places, which attention must not see: it needs an attention
    function that adds `CapsuleCache.key_bias`.
    """

    name = "evict"

    def decode(self, payload: Payload) -> tuple[Tensor, Tensor]:
        """Kept tokens in their places, zeros elsewhere."""
        positions = payload.tensors["kept"].long()[:, :, None, None]
        return self._spread(payload.tensors["keys"], positions), self._spread(
            payload.tensors["values"], positions
        )

    def latent(self, payload: Payload) -> LatentBlocks:
        """Kept tokens as slots; there are no others."""
        keys, values = (payload.tensors[name] for name in ("keys", "values"))
        return LatentBlocks(keys, values, TokenMap(), TokenMap())

    def source(self, payload: Payload, rows: BlockRows, batch: int, steps: Steps | None = None) -> Source:
        """Kept tokens as they lie in memory: those of a row, in which every head has its own."""
        keys, values = (x.flatten(0, 1) for x in payload.stored)  # [M r, H, D]
        each = torch.full((len(rows.rows), keys.shape[1]), self.kept, device=keys.device)
        counts = rows.sums(each, batch)
        return Source(keys, values, counts.cumsum(0) - counts, counts, steps)

    def missing(self, payload: Payload) -> Tensor | None:
        """Tokens that were not kept: bool `[M, N]`."""
        if self.kept == self.block_size:
            return None
        positions = payload.tensors["kept"].long()
        everywhere = torch.ones(len(positions), self.block_size, dtype=torch.bool, device=positions.device)
        return everywhere.scatter(1, positions, False)

    def _spread(self, x: Tensor, positions: Tensor) -> Tensor:
        full = x.new_zeros(x.shape[0], self.block_size, *x.shape[2:])
        return full.scatter(1, positions.expand_as(x), x).transpose(1, 2)
