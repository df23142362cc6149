"""What a cache layer needs of a codec: blocks in, stored numbers out, and back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from capsight.errors import CapsightError
from capsight.kvcapsule.attention import BlockRows, KeptTokens, LatentBlocks
from capsight.kvcapsule.attention.latents import LayerBasis, PackedLatents
from capsight.kvcapsule.attention.native import Source, Steps
from capsight.kvcapsule.codecs.positions import TokenPositions
from capsight.kvcapsule.plan import Run


@dataclass(eq=False)
class Payload:
    """Capsules of M blocks in one layer: named tensors, each with the blocks along its first axis.

    Attributes:
        tensors: by name.
        hides: whether attention must not see all that is decoded of them; None until it is asked.
    """

    tensors: dict[str, Tensor]
    hides: bool | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def stored(self) -> tuple[Tensor, Tensor]:
        """Keys and values, or the levels they are quantised to."""
        keys, values = (f"{x}.levels" if f"{x}.levels" in self.tensors else x for x in ("keys", "values"))
        return self.tensors[keys], self.tensors[values]

    def select(self, index: Tensor) -> Self:
        """The capsules at `index` int64 `[M']`, in that order."""
        return type(self)({name: tensor[index] for name, tensor in self.tensors.items()})

    def join(self, other: Payload) -> Self:
        """These capsules, then the other ones."""
        return type(self)(
            {name: torch.cat([tensor, other.tensors[name]]) for name, tensor in self.tensors.items()}
        )


class BlockCodec(nn.Module, ABC):
    """Stores the blocks of one layer in fewer numbers and gives full-length blocks back.

    Attributes:
        name: the name by which options, files and messages call the codec.
        block_size: tokens in a block (N).
        layers_together: how many layers are best encoded together.
        sharing: how many layers hold the same payload.
        needs_positions: whether it has to know the positions of tokens.
        shared: names of what was learnt that all layers have alike; files have it once.
    """

    name: ClassVar[str]
    layers_together: int = 1
    sharing: int = 1
    needs_positions: ClassVar[bool] = False
    shared: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, block_size: int) -> None:
        """Set the block size."""
        super().__init__()
        self.block_size = block_size

    @classmethod
    def ready(cls, codecs: Sequence[Self]) -> Sequence[Self]:
        """The codecs of all layers, which know what is best computed for all layers together.

        They are dropped once they have encoded, and what they know with them.
        """
        return codecs

    @abstractmethod
    def encode_runs(self, keys: Tensor, values: Tensor, runs: Sequence[Run]) -> Payload:
        """Store blocks.

        Args:
            keys: `[M, H, N, D]`, after RoPE.
            values: `[M, H, N, D]`.
            runs: where the M blocks lie, ascending by row, then position.

        Returns:
            A payload of M capsules, in the dtype of the blocks.
        """

    @classmethod
    def encode_layers(
        cls,
        codecs: Sequence[BlockCodec],
        keys: Sequence[Tensor],
        values: Sequence[Tensor],
        runs: Sequence[Run],
    ) -> list[Payload]:
        """Store the blocks that several layers have at the same places.

        Args:
            codecs: codec of each layer, all of this class.
            keys: `[M, H, N, D]` of each layer, after RoPE.
            values: `[M, H, N, D]` of each layer.
            runs: where the M blocks lie.
        """
        return [c.encode_runs(k, v, runs) for c, k, v in zip(codecs, keys, values, strict=True)]

    def gather(self, held: Any, keys: Tensor, values: Tensor, positions: TokenPositions | None) -> Any:
        """Hold this layer's blocks, with those of other layers, until they are encoded.

        Args:
            held: what other layers have left here; None in the first.
            keys: `[M, H, N, D]`, after RoPE.
            values: `[M, H, N, D]`.
            positions: of their tokens, where `needs_positions`.
        """
        return [*(held or ()), (keys, values)]

    @classmethod
    def encode_gathered(cls, codecs: Sequence[BlockCodec], held: Any, runs: Sequence[Run]) -> list[Payload]:
        """Store what `gather` holds of several layers; `runs` are where the blocks lie."""
        keys, values = (list(part) for part in zip(*held, strict=True))
        return cls.encode_layers(codecs, keys, values, runs)

    def decode_at(
        self, payload: Payload, positions: TokenPositions | None, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """Keys, after RoPE, and values `[M, H, N, D]` of capsules whose tokens are at `positions`."""
        return self.decode(payload)

    def template(self, heads: int, head_dim: int, dtype: torch.dtype) -> Payload:
        """A capsule of one block: names, shapes and dtypes are those of any other."""
        device = next(self.buffers()).device
        zeros = torch.zeros(1, heads, self.block_size, head_dim, dtype=dtype, device=device)
        return self.encode_runs(zeros, zeros, [Run(0, 0, self.block_size)])

    @abstractmethod
    def decode(self, payload: Payload) -> tuple[Tensor, Tensor]:
        """Keys and values `[M, H, N, D]` of the capsules; kept tokens are copied bit for bit."""

    def leaves(self, new: Tensor) -> bool:
        """Whether attention of new tokens `[B, H, Q, D]` is better done on capsules as they are."""
        return True

    @property
    def basis(self) -> LayerBasis:
        """What makes keys and values of latents that all layers share.

        Raises:
            CapsightError: the codec stores no such latents.
        """
        raise CapsightError(f"the {self.name} codec stores no latents")

    def stored_latents(self, payload: Payload) -> PackedLatents:
        """Such latents as they are stored.

        Raises:
            CapsightError: the codec stores none.
        """
        raise CapsightError(f"the {self.name} codec stores no latents")

    def latent(self, payload: Payload) -> LatentBlocks | KeptTokens:
        """The capsules as attention reads them without rebuilding tokens.

        Raises:
            CapsightError: the codec is not linear in what it stores.
        """
        raise CapsightError(f"the {self.name} codec has no latent form; use decode='materialise'")

    def source(
        self, payload: Payload, rows: BlockRows, batch: int, steps: Steps | None = None
    ) -> Source | None:
        """The capsules as native attention reads them, where nothing but kept tokens is seen.

        Args:
            payload: capsules of M blocks.
            rows: where they belong.
            batch: how many rows there are.
            steps: what makes numbers of levels, of a codec around this one that quantised them.
        """
        return None

    def bias(self, payload: Payload) -> Tensor | None:
        """What attention has to add to its scores over decoded blocks.

        Returns:
            float32 `[M, H or 1, N]`, minus infinity for tokens that decoding leaves empty; None where
            there is nothing to add.
        """
        return None

    def hides(self, payload: Payload) -> bool:
        """Whether there is a bias; computed once for each payload."""
        if payload.hides is None:
            payload.hides = self.bias(payload) is not None
        return payload.hides

    @property
    def module_nbytes(self) -> int:
        """Bytes of what was learnt, as resident in memory."""
        return sum(tensor.nbytes for tensor in self.state_dict().values())
