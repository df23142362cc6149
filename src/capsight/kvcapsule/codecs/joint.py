"""The `joint` codec: one latent per vision token for all layers (ours; cf. xKV, KVTC, arXiv 2511.01815).

A token's keys before RoPE and its values, of all full-attention layers and KV heads, are one vector x.
Calibration gives its mean and principal axes U; what is stored is z = U^T W (x - mean), its leading
coordinates in 8, 4 or 2 bits. Every layer reads the same z through its own rows of U: keys and values are
mean + W^-1 U z, and keys are turned to their positions. W makes keys and values of all layers alike in size.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from capsight.errors import CapsightError, OptionError, UnlikeCalibrationWarning
from capsight.kvcapsule.attention.latents import LayerBasis, PackedLatents
from capsight.kvcapsule.attention.native import supports
from capsight.kvcapsule.budget import check_share
from capsight.kvcapsule.codecs.base import LayerCodec, take_tensors
from capsight.kvcapsule.codecs.block import Payload
from capsight.kvcapsule.codecs.joint_payload import JointPayload, OpenLatents
from capsight.kvcapsule.codecs.levels import BITS, GROUP, POINTS, pack, share_bits, unpack
from capsight.kvcapsule.codecs.moments import LayerMoments
from capsight.kvcapsule.codecs.positions import TokenPositions
from capsight.kvcapsule.codecs.rotary import Rotary
from capsight.kvcapsule.plan import Run

_WHOLE = 2**31  # block size of a codec that stores nothing: no image is as long
_UNLIKE = 4.0  # times the loss on calibration images from which on images are said to be unlike them
_FEW = 4  # new tokens of a row up to which attention reads latents as they are
_SHAPES: dict[str, tuple[int | None, ...]] = {
    "lost": (None, 4),
    "typical": (1,),
    "frequencies": (None,),
    "pairs": (None,),
    "turning": (3,),
}
_DTYPES = {"axes": torch.bfloat16, "lost": torch.float64, "frequencies": torch.float64, "pairs": torch.int64}


class Gathered(NamedTuple):
    """What layers have added up of T tokens.

    Attributes:
        latents: float32 `[T, R]`.
        energy: float32 `[]`, sum of the squares of W (x - mean).
        layers: how many have.
    """

    latents: Tensor
    energy: Tensor
    layers: int


class JointCodec(LayerCodec):
    """One layer's share of the joint codec; a block is one token.

    Buffers:
        mean: float32 `[2, H, D]`, of keys before RoPE and of values.
        axes: bfloat16 `[K, 2, H, D]`, this layer's columns of U^T W^-1, most variance first.
        weight: float32 `[2]`, this layer's entries of W for keys and values.
        lost: float64 `[K / GROUP, 4]`, see `levels.distortions`; it and what follows is alike in all layers.
        typical: float32 `[1]`, share of the variance that K coordinates lose on calibration images.
        frequencies, pairs: float64 and int64 `[P]`, see `Rotary`.
        turning: float32 `[3]`: interleaved, scaling, layers that share a latent (L).
    """

    name: ClassVar[str] = "joint"
    needs_positions: ClassVar[bool] = True
    constants: ClassVar[Mapping[str, Any]] = {"group": GROUP, "bits": [*BITS], "points": [*POINTS]}
    mean: Tensor
    axes: Tensor
    weight: Tensor
    lost: Tensor
    typical: Tensor
    turning: Tensor

    def __init__(self, tensors: Mapping[str, Tensor], retained: float = 1.0) -> None:
        """Take buffers by name, and the share of the bytes to keep.

        Raises:
            OptionError: `retained` is not in (0, 1], or holds not a single group.
        """
        check_share(retained)
        super().__init__(_WHOLE if retained == 1 else 1, 1)
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)
        self.axes = self.axes.movedim(0, -1).contiguous().movedim(-1, 0)  # the K of a channel lie together
        interleaved, scaling, layers = tensors["turning"].tolist()
        self.rotary = Rotary(tensors["frequencies"], tensors["pairs"], bool(interleaved), scaling)
        self.layers_together = self.sharing = int(layers)
        self.share = retained
        self._dtype = torch.bfloat16 if torch.cpu._is_amx_tile_supported() else torch.float32
        self.full_nbytes = 2 * self.mean.numel() * self.layers_together  # of a token in 16 bits
        self.levels = share_bits(self.lost, retained * self.full_nbytes)

    @classmethod
    def fit(cls, moments: LayerMoments, kept: int, **options: Any) -> Self:
        """Not fitted layer by layer: see `calibration.joint`."""
        raise OptionError("the joint codec is fitted to all layers at once; use KVCapsule.fit")

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], shape: tuple[int, int, int], kept: int) -> Self:
        """The codec whose `state_dict()` gave `tensors`, at `retained` 1."""
        heads, _, head_dim = shape
        shapes = {"mean": (2, heads, head_dim), "axes": (None, 2, heads, head_dim), "weight": (2,), **_SHAPES}
        taken = dict(zip(shapes, take_tensors(tensors, shapes, _DTYPES), strict=True))
        sizes = taken["axes"].shape[0], len(taken["lost"]) * GROUP
        pairs = len(taken["pairs"])
        fits = sizes[0] == sizes[1] and pairs == len(taken["frequencies"]) and 2 * pairs <= head_dim
        known = ((taken["pairs"] >= 0) & (taken["pairs"] < 3)).all() and (taken["turning"][1:] > 0).all()
        if not fits or not known or not (taken["weight"] > 0).all():
            raise OptionError("the tensors of the joint codec do not fit together")
        return cls(taken)

    def at(self, retained: float) -> Self:
        """This codec at another share of the bytes; buffers are shared.

        Raises:
            OptionError: `retained` is not in (0, 1], or too small.
        """
        return type(self)(dict(self.named_buffers()), retained)

    @property
    def coding(self) -> list[int]:
        """Coordinates in 8, 4 and 2 bits, and whether images are stored at all."""
        return [*self.levels.counts, self.block_size]

    @property
    def retained(self) -> float:
        """Bytes of a latent over those of the token's keys and values of all layers in 16 bits."""
        return 1.0 if self.block_size == _WHOLE else self.levels.nbytes / self.full_nbytes

    def gather(
        self, held: Gathered | None, keys: Tensor, values: Tensor, positions: TokenPositions | None
    ) -> Gathered:
        """Add this layer's part of the latents: keys and values need not wait for other layers.

        Args:
            held: what other layers have added up.
            keys: `[T, H, 1, D]`, after RoPE.
            values: `[T, H, 1, D]`.
            positions: of the T tokens.
        """
        assert positions is not None
        turned, tables = keys[:, :, 0].transpose(0, 1), positions.tables(self.rotary)
        k = self.rotary.unturn(turned, *tables).transpose(0, 1).sub_(self.mean[0])  # [T, H, D], float32
        v = values[:, :, 0] - self.mean[1]
        if held is None:
            held = Gathered(k.new_zeros(len(k), self.levels.rank), k.new_zeros(()), 0)
        latents, energy, layers = held
        part = latents if latents.device == k.device else torch.zeros_like(latents, device=k.device)
        axes = self.axes[: self.levels.rank].float()  # [R, 2, H, D]
        for kind, (x, square) in enumerate(zip((k, v), self.weight.square().tolist(), strict=True)):
            part.addmm_(x.flatten(1), axes[:, kind].flatten(1).T, alpha=square)  # W^2 (x - mean) U
            energy = energy + square * x.flatten().dot(x.flatten()).to(latents.device)
        if part is not latents:
            latents.add_(part.to(latents.device))
        return Gathered(latents, energy, layers + 1)

    @classmethod
    def encode_gathered(cls, codecs: Sequence[Any], held: Gathered, runs: Sequence[Run]) -> list[Payload]:
        """Store latents that all layers have added to."""
        first = codecs[0]
        first._compare(held)
        codes, scales = pack(held.latents, first.levels)
        return [JointPayload({"codes": codes, "scales": scales})] * len(codecs)

    def decode(self, payload: Payload) -> tuple[Tensor, Tensor]:
        """Keys before RoPE and values `[T, H, 1, D]`, float32."""
        keys, values = self.expand(self.latents(payload))
        return keys[:, :, None], values[:, :, None]

    def decode_at(
        self, payload: Payload, positions: TokenPositions | None, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """Keys at `positions` and values, `[T, H, 1, D]`."""
        assert positions is not None
        keys, values = self.expand(self.latents(payload))
        keys = self.rotary.turn(keys.transpose(0, 1), *positions.tables(self.rotary)).transpose(0, 1)
        return keys[:, :, None].to(dtype), values[:, :, None].to(dtype)

    def leaves(self, new: Tensor) -> bool:
        """Where native code runs, and for few new tokens: for many, keys are better rebuilt once."""
        return new.shape[2] <= _FEW and supports(new)

    @cached_property
    def basis(self) -> LayerBasis:
        """This layer's axes as attention over latents takes them."""
        keys, values = self.axes[: self.levels.rank].permute(1, 2, 3, 0)  # [H, D, R] each
        return LayerBasis(keys, self.mean[0], values, self.mean[1])

    def stored_latents(self, payload: Payload) -> PackedLatents:
        """Latents as they are stored."""
        codes, scales = payload.tensors["codes"], payload.tensors["scales"]
        return PackedLatents(codes, scales, self.levels.counts, POINTS)

    def latents(self, payload: Payload) -> Tensor:
        """Latents `[T, R]`; unpacked once for all layers, and forgotten after the last one.

        In bfloat16 where matrix products are much faster so: that rounds less than eight bits do.
        """
        assert isinstance(payload, JointPayload)
        if payload.open is None:
            codes, scales = payload.tensors["codes"], payload.tensors["scales"]
            payload.open = OpenLatents(unpack(codes, scales, self.levels, self._dtype), self.layers_together)
        found = payload.open.latents
        payload.open.left -= 1
        if payload.open.left <= 0:
            payload.open = None
        return found

    def encode(self, keys: Tensor, values: Tensor) -> Payload:
        """Not encoded layer by layer: see `gather`."""
        raise CapsightError("the joint codec stores all layers at once")

    def template(self, heads: int, head_dim: int, dtype: torch.dtype) -> Payload:
        """The latent of one token."""
        codes, scales = pack(torch.zeros(1, self.levels.rank, device=self.mean.device), self.levels)
        return JointPayload({"codes": codes, "scales": scales})

    def expand(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Keys before RoPE and values float32 `[T, H, D]` of latents `[T, R]`."""
        axes = self.axes[: self.levels.rank].flatten(1).to(latents.dtype)  # [R, F]
        both = (latents.to(axes.device) @ axes).view(-1, *self.mean.shape) + self.mean
        return both[:, 0], both[:, 1]

    def payload_nbytes(self, heads: int, head_dim: int, itemsize: int) -> float:
        """Bytes of a token, shared out over the layers."""
        return self.levels.nbytes / self.layers_together

    def _compare(self, held: Gathered) -> None:
        """Say so where images lose far more than those of calibration did."""
        left_out = self.lost[self.levels.rank // GROUP :, 0].sum() / self.lost[:, 0].sum()
        typical = float(self.typical) + float(left_out)
        lost = float(1 - held.latents.square().sum() / held.energy.clamp_min(1e-30))
        if lost > max(_UNLIKE * typical, 0.02):
            warnings.warn(
                f"these images are unlike those the capsule was fitted to: latents lose {lost:.0%} of "
                f"their variance, {typical:.1%} in calibration; fit with such samples, or retain more",
                UnlikeCalibrationWarning,
                stacklevel=2,
            )
