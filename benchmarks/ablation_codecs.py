"""Codecs that are compared with the ones that ship: keys and values stored by any two token-axis codecs.

A kind codec stores blocks `[M, N, H, D]` of one kind (keys or values) as `[M, r, H, D]`. G is 1 where all
KV heads share what was learnt, else H.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from ablation_selection import Rule, cholesky
from torch import Tensor, nn

from capsight.kvcapsule.codecs import AdaptiveCodec, BlockCodec, Payload
from capsight.kvcapsule.codecs.kriging import prediction_weights, with_nugget
from capsight.kvcapsule.codecs.moments import TokenMoments, rms
from capsight.kvcapsule.codecs.token_mlp import TokenMlp
from capsight.kvcapsule.plan import Run

RIDGE = 1e-2
"""As the `static` codec has it."""


class KindCodec(nn.Module, ABC):
    """Stores blocks of one kind."""

    @abstractmethod
    def encode(self, x: Tensor) -> Tensor:
        """`[M, r, H, D]` for blocks `[M, N, H, D]`."""

    @abstractmethod
    def decode(self, stored: Tensor) -> Tensor:
        """Blocks `[M, N, H, D]` again."""


class Retain(KindCodec):
    """r fixed tokens are kept, the others are a linear map of them, plus an MLP where there is one."""

    index: Tensor
    maps: Tensor

    def __init__(self, index: Tensor, maps: Tensor, mlp: TokenMlp | None = None) -> None:
        """Take positions int64 `[r]`, maps float32 `[G, N, r]`, and a shared MLP."""
        super().__init__()
        self.register_buffer("index", index)
        self.register_buffer("maps", maps)
        self.has_mlp = mlp is not None
        for name, weights in zip(TokenMlp._fields, mlp or (), strict=False):
            self.register_buffer(name, weights)

    @classmethod
    def fit(
        cls, kind: TokenMoments, kept: int, attention: Tensor, rule: Rule = cholesky, per_head: bool = False
    ) -> Retain:
        """Solve for the maps in closed form; positions are those of a rule on the mean over heads."""
        heads = kind.about(torch.zeros(1, dtype=torch.float64))  # [H, N, N]
        heads = heads / rms(heads)[:, None, None] ** 2
        shared = with_nugget(heads.mean(0), RIDGE)
        index = rule(shared, attention, kept)
        second = with_nugget(heads, RIDGE) if per_head else shared[None]
        return cls(index, prediction_weights(second, index[None])[0].float())

    def with_mlp(self, mlp: TokenMlp) -> Retain:
        """The same with an MLP."""
        return type(self)(self.index, self.maps, mlp)

    def encode(self, x: Tensor) -> Tensor:
        """The kept tokens."""
        return x[:, self.index]

    def decode(self, stored: Tensor) -> Tensor:
        """Map the kept tokens to all, and put them back into their places."""
        full = (self.maps.to(stored.dtype) @ stored.transpose(1, 2)).transpose(1, 2).contiguous()
        if self.has_mlp:
            rest = torch.ones(full.shape[1], dtype=torch.bool)
            rest[self.index] = False
            mlp = TokenMlp(*(getattr(self, name) for name in TokenMlp._fields))
            full[:, rest] += mlp(stored.flatten(2)).view(len(full), -1, *full.shape[2:])
        full[:, self.index] = stored
        return full


class TokenPca(KindCodec):
    """PCA along the token axis; samples are channels."""

    mean: Tensor
    basis: Tensor

    def __init__(self, mean: Tensor, basis: Tensor) -> None:
        """Take the mean of every position, float32 `[G, N]`, and bases `[G, N, r]`."""
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("basis", basis)

    @classmethod
    def fit(cls, kind: TokenMoments, kept: int, per_head: bool = False) -> TokenPca:
        """Solve for mean and basis in closed form."""
        if per_head:
            mean = kind.total.mean(2) / kind.blocks  # [H, N]
            covariance = kind.about(mean[:, :, None])
        else:
            mean = kind.token_mean()[None]
            covariance = kind.about(mean[0, :, None]).mean(0, keepdim=True)
        basis = torch.linalg.eigh(covariance).eigenvectors.flip(2)[:, :, :kept]
        return cls(mean.float(), basis.float().contiguous())

    def encode(self, x: Tensor) -> Tensor:
        """Coordinates in the basis."""
        centred = x.float().transpose(1, 2) - self.mean[..., None]  # [M, H, N, D]
        return (self.basis.mT @ centred).transpose(1, 2).to(x.dtype)

    def decode(self, stored: Tensor) -> Tensor:
        """Basis times coordinates, plus the mean."""
        full = self.basis.to(stored.dtype) @ stored.transpose(1, 2)
        return (full + self.mean.to(stored.dtype)[..., None]).transpose(1, 2)


class PairCodec(BlockCodec):
    """One kind codec for keys and one for values."""

    name: ClassVar[str] = "pair"

    def __init__(self, block_size: int, keys: KindCodec, values: KindCodec) -> None:
        """Join the two."""
        super().__init__(block_size)
        self.keys, self.values = keys, values

    def encode_runs(self, keys: Tensor, values: Tensor, runs: Sequence[Run]) -> Payload:
        """Store each kind of blocks `[M, H, N, D]` by its codec."""
        stored = self.keys.encode(keys.transpose(1, 2)), self.values.encode(values.transpose(1, 2))
        return Payload(dict(zip(("keys", "values"), stored, strict=True)))

    def decode(self, payload: Payload) -> tuple[Tensor, Tensor]:
        """Open each."""
        keys, values = payload.tensors["keys"], payload.tensors["values"]
        return self.keys.decode(keys).transpose(1, 2), self.values.decode(values).transpose(1, 2)


class ApartCodec(BlockCodec):
    """`adaptive` with a set of tokens for the keys of a block and another for its values."""

    name: ClassVar[str] = "apart"

    def __init__(self, keys: AdaptiveCodec, values: AdaptiveCodec) -> None:
        """Take a codec that chooses by keys and one that chooses by values."""
        super().__init__(keys.block_size)
        self.keys, self.values = keys, values

    def encode_runs(self, keys: Tensor, values: Tensor, runs: Sequence[Run]) -> Payload:
        """Store each kind of blocks `[M, H, N, D]` at the places chosen for it."""
        first, second = (codec.encode(keys, values).tensors for codec in (self.keys, self.values))
        return Payload(
            {
                "keys": first["keys"],
                "kept": first["kept"],
                "values": second["values"],
                "values_kept": second["kept"],
            }
        )

    def decode(self, payload: Payload) -> tuple[Tensor, Tensor]:
        """Rebuild each kind from its own tokens; the other kind goes along unused."""
        keys, values, kept, values_kept = (
            payload.tensors[name] for name in ("keys", "values", "kept", "values_kept")
        )
        first = self.keys.decode(Payload({"keys": keys, "values": keys, "kept": kept}))
        second = self.values.decode(Payload({"keys": values, "values": values, "kept": values_kept}))
        return first[0], second[1]


class FixedEvict(BlockCodec):
    """The control of fixed positions: keys and values of these are kept, the others are hidden."""

    name: ClassVar[str] = "fixed-evict"
    index: Tensor

    def __init__(self, block_size: int, index: Tensor) -> None:
        """Take the positions kept, int64 `[r]`."""
        super().__init__(block_size)
        self.register_buffer("index", index)

    def encode_runs(self, keys: Tensor, values: Tensor, runs: Sequence[Run]) -> Payload:
        """The kept tokens of blocks `[M, H, N, D]`, as `[M, r, H, D]`."""
        return Payload(
            {
                "keys": keys[:, :, self.index].transpose(1, 2),
                "values": values[:, :, self.index].transpose(1, 2),
            }
        )

    def decode(self, payload: Payload) -> tuple[Tensor, Tensor]:
        """Kept tokens in their places, zeros elsewhere."""
        return self._spread(payload.tensors["keys"]), self._spread(payload.tensors["values"])

    def bias(self, payload: Payload) -> Tensor:
        """Minus infinity for what was not kept: `[M, 1, N]`."""
        hidden = torch.full((self.block_size,), -torch.inf)
        hidden[self.index] = 0
        return hidden.expand(len(payload.tensors["keys"]), 1, -1)

    def _spread(self, kept: Tensor) -> Tensor:
        full = kept.new_zeros(len(kept), self.block_size, *kept.shape[2:])
        full[:, self.index] = kept
        return full.transpose(1, 2)
