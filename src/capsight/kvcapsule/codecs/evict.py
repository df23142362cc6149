"""The `evict` codec: the control that keeps what `adaptive` keeps and rebuilds nothing."""

from __future__ import annotations

import torch
from torch import Tensor

from capsight.kvcapsule.attention import LatentBlocks, TokenMap
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
        kept = payload.tensors["kept"].long()[:, :, None, None]
        return self._spread(payload.tensors["keys"], kept), self._spread(payload.tensors["values"], kept)

    def latent(self, payload: Payload) -> LatentBlocks:
        """Kept tokens as slots; there are no others."""
        keys, values = (payload.tensors[name] for name in ("keys", "values"))
        return LatentBlocks(keys, values, TokenMap(), TokenMap())

    def missing(self, payload: Payload) -> Tensor | None:
        """Tokens that were not kept: bool `[M, N]`."""
        if self.kept == self.block_size:
            return None
        kept = payload.tensors["kept"].long()
        everywhere = torch.ones(len(kept), self.block_size, dtype=torch.bool, device=kept.device)
        return everywhere.scatter(1, kept, False)

    def _spread(self, x: Tensor, kept: Tensor) -> Tensor:
        full = x.new_zeros(x.shape[0], self.block_size, *x.shape[2:])
        return full.scatter(1, kept.expand_as(x), x).transpose(1, 2)
