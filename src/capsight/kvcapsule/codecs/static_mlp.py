"""The `static-mlp` codec: `static`, with a small MLP that corrects the linearly rebuilt keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor

from capsight.errors import CapsightError, OptionError
from capsight.kvcapsule.attention import LatentBlocks
from capsight.kvcapsule.codecs.base import take_tensors
from capsight.kvcapsule.codecs.block import Payload
from capsight.kvcapsule.codecs.moments import LayerMoments
from capsight.kvcapsule.codecs.static import StaticCodec
from capsight.kvcapsule.codecs.token_mlp import TokenMlp

MLP = ("mlp_in", "mlp_bias", "mlp_out")


class StaticMlpCodec(StaticCodec):
    """Keys: r fixed positions are kept, the rest is a linear map of them plus an MLP. Values: as `static`.

    `fit` gives an MLP that adds nothing; `KVCapsule.fit` has it trained on calibration keys.

    Buffers, beside those of `StaticCodec`:
        mlp_in: float32 `[W, r]`.
        mlp_bias: float32 `[W]`.
        mlp_out: float32 `[N - r, W]`, for the keys that are not kept, in order of position.

    Capsules: as `StaticCodec`.
    """

    name = "static-mlp"
    mlp_in: Tensor
    mlp_bias: Tensor
    mlp_out: Tensor

    def __init__(self, *static: Tensor, mlp: TokenMlp) -> None:
        """Take the buffers of `StaticCodec` in their order, and the MLP."""
        super().__init__(*static)
        for name, weights in zip(MLP, mlp, strict=True):
            self.register_buffer(name, weights)

    @classmethod
    def fit(cls, moments: LayerMoments, kept: int, *, ridge: float = 1e-2, width: int = 32, **_: Any) -> Self:
        """Solve for the linear part from one layer's calibration moments; the MLP is still zero.

        Args:
            moments: sums over calibration blocks.
            kept: keys and principal components kept of each block (r).
            ridge: as for `StaticCodec`.
            width: hidden units of the MLP (W).

        Raises:
            OptionError: `width` is less than 1, or another option is out of range.
        """
        if isinstance(width, bool) or not isinstance(width, int) or width < 1:
            raise OptionError(f"width is the number of hidden units, a whole number from 1 on, not {width!r}")
        linear = StaticCodec.fit(moments, kept, ridge=ridge)
        mlp = TokenMlp.zero(kept, moments.block_size - kept, width)
        return cls(*linear.state_dict().values(), mlp=mlp)

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], shape: tuple[int, int, int], kept: int) -> Self:
        """The codec for blocks of `shape` (H, N, D) whose `state_dict()` gave `tensors`."""
        rest = {name: tensor for name, tensor in tensors.items() if name not in MLP}
        linear = StaticCodec.from_tensors(rest, shape, kept)
        mlp_tensors = {name: tensor for name, tensor in tensors.items() if name in MLP}
        width = mlp_tensors["mlp_bias"].numel() if "mlp_bias" in mlp_tensors else None
        shapes = {"mlp_in": (width, kept), "mlp_bias": (width,), "mlp_out": (shape[1] - kept, width)}
        return cls(*linear.state_dict().values(), mlp=TokenMlp(*take_tensors(mlp_tensors, shapes, {})))

    @property
    def mlp(self) -> TokenMlp:
        """The MLP in use."""
        return TokenMlp(self.mlp_in, self.mlp_bias, self.mlp_out)

    def with_mlp(self, mlp: TokenMlp) -> Self:
        """This codec with another MLP of the same sizes; shares the other buffers."""
        static = (self.kept_index, self.key_map, self.value_mean, self.value_basis)
        return type(self)(*static, mlp=mlp)

    def rebuilt_keys(self, kept_keys: Tensor) -> Tensor:
        """All keys `[M, N, C]` from the kept ones `[M, r, C]`."""
        keys = super().rebuilt_keys(kept_keys)
        keys[:, self.others] += self.mlp(kept_keys)
        return keys

    def latent(self, payload: Payload) -> LatentBlocks:
        """There is no latent form, since keys are not linear in what is stored.

        Raises:
            CapsightError: always, unless everything is kept.
        """
        if self.kept == self.block_size:
            return super().latent(payload)
        raise CapsightError(f"the {self.name} codec has no latent form; use decode='materialise'")

    @property
    def others(self) -> Tensor:
        """Positions that are not kept, ascending: int64 `[N - r]`."""
        rest = torch.ones(self.block_size, dtype=torch.bool, device=self.kept_index.device)
        rest[self.kept_index] = False
        return rest.nonzero()[:, 0]
