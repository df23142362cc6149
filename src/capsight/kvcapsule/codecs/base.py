"""The codec interface: what turns one layer's image blocks into capsules and back."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from capsight.errors import OptionError
from capsight.kvcapsule.codecs.block import BlockCodec, Payload
from capsight.kvcapsule.codecs.moments import LayerMoments
from capsight.kvcapsule.plan import Run


class LayerCodec(BlockCodec):
    """Codec of one layer. What it learnt is in buffers, which `state_dict()` lists and files hold.

    Keys come in as the cache gets them: after RoPE. Blocks are `[M, H, N, D]` with H the KV heads,
    N the block size and D the head size; capsules keep r = `kept` of N tokens' worth of numbers,
    `[M, r, H, D]`, or r on average (`HeadsCodec`). With r = N, decoding gives the blocks
    back bit for bit. Blocks are fastest when their memory is token-major, as attention projections leave it,
    and are decoded so.

    Attributes:
        name: the name by which options and files call the codec.
        block_size: tokens in a block (N).
        kept: tokens' worth of numbers kept of it (r).
        keys_by_token: whether stored keys are quantised token by token, not channel by channel.
        constants: JSON-ready numbers that stored numbers take their meaning from; files name them, and those
            that a file does not name are as `from_tensors` finds them.
    """

    keys_by_token: ClassVar[bool] = False
    constants: ClassVar[Mapping[str, Any]] = {}

    def __init__(self, block_size: int, kept: int) -> None:
        """Set the sizes.

        Raises:
            OptionError: `kept` is not in 1..block_size.
        """
        super().__init__(block_size)
        check_kept(kept, block_size)
        self.kept = kept

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

    def learnt(self) -> dict[str, Tensor]:
        """Tensors that files hold, by name."""
        return self.state_dict()

    @abstractmethod
    def encode(self, keys: Tensor, values: Tensor) -> Payload:
        """Make capsules of blocks `[M, H, N, D]`; tensors of the payload keep the dtype of the blocks."""

    def encode_runs(self, keys: Tensor, values: Tensor, runs: Sequence[Run]) -> Payload:
        """Make capsules of blocks `[M, H, N, D]`, each on its own: where they lie does not matter."""
        return self.encode(keys, values)

    @abstractmethod
    def payload_nbytes(self, heads: int, head_dim: int, itemsize: int) -> float:
        """Bytes of a block's capsule, on average, for H heads of size D and numbers of `itemsize` bytes."""

    def typical_channels(self) -> tuple[Tensor, Tensor] | None:
        """Mean and deviation of each channel of keys, `[H, D]` each, where `keys_by_token`; else None."""
        return None

    def typical_keys(self, payload: Payload) -> tuple[Tensor, Tensor] | None:
        """Mean and deviation of each channel of the stored keys, where `keys_by_token`; else None."""
        return None

    def missing(self, payload: Payload) -> Tensor | None:
        """Tokens that decoding leaves empty, which attention must not see: bool `[M, N]`, or None."""
        return None

    def bias(self, payload: Payload) -> Tensor | None:
        """Minus infinity for the missing tokens, 0 for all others: float32 `[M, 1, N]`, or None."""
        missing = self.missing(payload)
        if missing is None:
            return None
        return torch.zeros(missing.shape, device=missing.device).masked_fill(missing, -torch.inf)[:, None]

    def resized(self, kept: int) -> Self:
        """This codec with another number of kept tokens, sharing what was learnt.

        Raises:
            OptionError: the codec has to be fitted again for that.
        """
        if kept == self.kept:
            return self
        raise OptionError(
            f"the {self.name} codec is fitted for one retained fraction; fit again with the new one"
        )

    def with_weights(self, weights: Any) -> Self:
        """This codec with its prediction weights "solved" or "stored", sharing what was learnt.

        Raises:
            OptionError: it has none, or `weights` is neither.
        """
        raise OptionError(f"the {self.name} codec has no prediction weights; leave out weights={weights!r}")

    @property
    def coding(self) -> Any:
        """What else says how numbers are stored, JSON-ready; None if nothing does."""
        return None

    @property
    def retained(self) -> float:
        """Fraction kept, r / N."""
        return self.kept / self.block_size


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
