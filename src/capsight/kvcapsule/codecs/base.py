"""The codec interface: what turns one layer's image blocks into capsules and back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from capsight.errors import OptionError
from capsight.kvcapsule.moments import LayerMoments


@dataclass(frozen=True, slots=True, eq=False)
class Payload:
    """Capsules of M blocks in one layer: named tensors, each with the blocks along its first axis."""

    tensors: dict[str, Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def select(self, index: Tensor) -> Payload:
        """The capsules at `index` int64 `[M']`, in that order."""
        return Payload({name: tensor[index] for name, tensor in self.tensors.items()})

    def join(self, other: Payload) -> Payload:
        """These capsules, then the other ones."""
        return Payload(
            {name: torch.cat([tensor, other.tensors[name]]) for name, tensor in self.tensors.items()}
        )


class LayerCodec(nn.Module, ABC):
    """Codec of one layer. What it learnt is in buffers, which `state_dict()` lists and files hold.

    Keys come in as the cache gets them: after RoPE. Blocks are `[M, H, N, D]` with H the KV heads,
    N the block size and D the head size; capsules keep r = `kept` of N tokens' worth of numbers,
    `[M, r, H, D]`. With r = N, decoding gives the blocks back bit for bit. Blocks are fastest when
    their memory is token-major, as attention projections leave it, and are decoded so.

    Attributes:
        name: the name by which options and files call the codec.
        block_size: tokens in a block (N).
        kept: tokens' worth of numbers kept of it (r).
    """

    name: ClassVar[str]

    def __init__(self, block_size: int, kept: int) -> None:
        """Set the sizes.

        Raises:
            OptionError: `kept` is not in 1..block_size.
        """
        super().__init__()
        check_kept(kept, block_size)
        self.block_size, self.kept = block_size, kept

    @classmethod
    @abstractmethod
    def fit(cls, moments: LayerMoments, kept: int, **options: Any) -> Self:
        """Solve for the codec in closed form from one layer's calibration moments."""

    @classmethod
    @abstractmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], shape: tuple[int, int, int], kept: int) -> Self:
        """The codec for blocks of `shape` (H, N, D) whose `state_dict()` gave `tensors`.

        Raises:
            OptionError: a tensor is missing, of the wrong shape or dtype, or one too many.
        """

    @abstractmethod
    def encode(self, keys: Tensor, values: Tensor) -> Payload:
        """Make capsules of blocks `[M, H, N, D]`; tensors of the payload keep the dtype of the blocks."""

    @abstractmethod
    def decode(self, payload: Payload) -> tuple[Tensor, Tensor]:
        """Keys and values `[M, H, N, D]` of the capsules; kept tokens are copied bit for bit."""

    @abstractmethod
    def payload_nbytes(self, heads: int, head_dim: int, itemsize: int) -> int:
        """Bytes of one block's capsule, for H heads of size D and numbers of `itemsize` bytes."""

    def missing(self, payload: Payload) -> Tensor | None:
        """Tokens that decoding leaves empty, which attention must not see: bool `[M, N]`, or None."""
        return None

    def resized(self, kept: int) -> Self:
        """This codec with another number of kept tokens, sharing what was learnt.

        Raises:
            OptionError: the codec has to be fitted again for that.
        """
        raise OptionError(
            f"the {self.name} codec is fitted for one retained fraction; fit again with the new one"
        )

    @property
    def retained(self) -> float:
        """Fraction kept, r / N."""
        return self.kept / self.block_size

    @property
    def module_nbytes(self) -> int:
        """Bytes of what was learnt, as resident in memory."""
        return sum(tensor.nbytes for tensor in self.state_dict().values())


def take_tensors(
    tensors: Mapping[str, Tensor],
    shapes: Mapping[str, tuple[int | None, ...]],
    dtypes: Mapping[str, torch.dtype],
) -> list[Tensor]:
    """The tensors named in `shapes`, in that order, checked; None in a shape stands for any size.

    Raises:
        OptionError: a tensor is missing, of the wrong shape or dtype, or one too many.
    """
    if set(tensors) != set(shapes):
        raise OptionError(f"expected the tensors {sorted(shapes)}, found {sorted(tensors)}")
    for name, shape in shapes.items():
        tensor, dtype = tensors[name], dtypes.get(name, torch.float32)
        fits = len(shape) == tensor.ndim and all(
            n in (None, m) for n, m in zip(shape, tensor.shape, strict=True)
        )
        if not fits or tensor.dtype != dtype:
            raise OptionError(
                f"tensor {name} is {tensor.dtype} {tuple(tensor.shape)}, expected {dtype} {shape}"
            )
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise OptionError(f"tensor {name} holds NaN or infinite values")
    return [tensors[name] for name in shapes]


def check_kept(kept: int, block_size: int) -> None:
    """Refuse a number of kept tokens that a block cannot have.

    Raises:
        OptionError: `kept` is not in 1..block_size.
    """
    if not 1 <= kept <= block_size:
        raise OptionError(f"a capsule keeps between 1 and {block_size} tokens of a block, not {kept}")


def check_ridge(ridge: float) -> None:
    """Refuse a ridge that does not make the matrix to invert positive definite.

    Raises:
        OptionError: `ridge` is outside 1e-4..1.
    """
    if not 1e-4 <= ridge <= 1:
        raise OptionError(f"ridge is a fraction of the mean variance between 1e-4 and 1, not {ridge}")


def index_dtype(block_size: int) -> torch.dtype:
    """The smallest integer dtype that holds positions in a block."""
    return torch.uint8 if block_size <= 256 else torch.int32
