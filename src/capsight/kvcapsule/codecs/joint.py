"""The `joint` codec: one latent per vision token for all layers (ours; cf. xKV, KVTC, arXiv 2511.01815).

A token's keys before RoPE and its values, of all full-attention layers and KV heads, are one vector x.
Calibration gives its mean and principal axes U; what is stored is z = U^T W (x - mean), its leading
coordinates in 8, 4 or 2 bits. Every layer reads the same z through its own rows of U: keys and values are
mean + W^-1 U z, and keys are turned to their positions. W makes keys and values of all layers alike in size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from capsight.errors import CapsightError, OptionError
from capsight.execution import has_amx, has_avx512_bf16
from capsight.kvcapsule.attention.latents import LayerBasis, PackedLatents
from capsight.kvcapsule.attention.native import centre, supports
from capsight.kvcapsule.budget import check_share
from capsight.kvcapsule.codecs.base import LayerCodec
from capsight.kvcapsule.codecs.block import Payload
from capsight.kvcapsule.codecs.gathered import Gathered
from capsight.kvcapsule.codecs.joint_axes import AXIS_BITS, coordinates_together, numbers
from capsight.kvcapsule.codecs.joint_coarse import least_squares, typical_loss
from capsight.kvcapsule.codecs.joint_payload import JointPayload, OpenLatents
from capsight.kvcapsule.codecs.joint_tensors import for_file, of_file
from capsight.kvcapsule.codecs.levels import BITS, GROUP, POINTS, pack, share_bits, unpack
from capsight.kvcapsule.codecs.moments import LayerMoments
from capsight.kvcapsule.codecs.positions import TokenPositions
from capsight.kvcapsule.codecs.rotary import Rotary
from capsight.kvcapsule.plan import Run

_WHOLE = 2**31  # block size of a codec that stores nothing: no image is as long
_FEW = 4  # new tokens of a row up to which attention reads latents as they are


class JointCodec(LayerCodec):
    """One layer's share of the joint codec; a block is one token.

    Of K axes the buffers have the R that get bits; `whole` gives all.

    Buffers:
        mean: float32 `[2, H, D]`, of keys before RoPE and of values.
        axes: int8 `[R, 2, H, D]`, this layer's columns of U^T W^-1 in steps, most variance first.
        steps: float32 `[2, R]`, of each axis in keys and in values.
        weight: float32 `[2]`, this layer's entries of W for keys and values.
        lost: float64 `[>= K / GROUP, 4]`, see `levels.distortions`; as what follows, of all layers.
        typical: float32 `[1]`, share of the variance that K coordinates lose on calibration images.
        frequencies, pairs: float64 and int64 `[P]`, see `Rotary`.
        turning: float32 `[3]`: interleaved, scaling, layers that share a latent (L).
    """

    name: ClassVar[str] = "joint"
    needs_positions: ClassVar[bool] = True
    shared: ClassVar[frozenset[str]] = frozenset(("lost", "typical", "frequencies", "pairs", "turning"))
    constants: ClassVar[Mapping[str, Any]] = {
        "group": GROUP,
        "bits": [*BITS],
        "points": [*POINTS],
        "axis_bits": AXIS_BITS,
    }
    mean: Tensor
    axes: Tensor
    steps: Tensor
    weight: Tensor
    lost: Tensor
    typical: Tensor
    turning: Tensor

    def __init__(self, tensors: Mapping[str, Tensor], retained: float = 1.0, lean: bool = False) -> None:
        """Take what was learnt by name, all K axes, and the share of the bytes to keep.

        Args:
            tensors: the buffers.
            retained: that share.
            lean: whether axes that get no bits are let go; else they stay in host memory for `at`.

        Raises:
            OptionError: `retained` is not in (0, 1], or holds not a single group.
        """
        check_share(retained)
        super().__init__(_WHOLE if retained == 1 else 1, 1)
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)
        interleaved, scaling, layers = tensors["turning"].tolist()
        self.rotary = Rotary(tensors["frequencies"], tensors["pairs"], bool(interleaved), scaling)
        self.layers_together = self.sharing = int(layers)
        self.share = retained
        self._dtype = torch.bfloat16 if has_amx() or has_avx512_bf16() else torch.float32
        self.inverse: Tensor | None = None  # of `joint_coarse.least_squares`
        self.full_nbytes = 2 * self.mean.numel() * self.layers_together  # of a token in 16 bits
        self.levels = share_bits(self.lost[: len(self.axes) // GROUP], retained * self.full_nbytes)
        rank = self.levels.rank
        self._others = None if lean else (self.axes[rank:].clone(), self.steps[:, rank:].clone())
        self.axes, self.steps = coordinates_together(self.axes[:rank]), self.steps[:, :rank].clone()

    @classmethod
    def fit(cls, moments: LayerMoments, kept: int, **options: Any) -> Self:
        """Not fitted layer by layer: see `calibration.joint`."""
        raise OptionError("the joint codec is fitted to all layers at once; use KVCapsule.fit")

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], shape: tuple[int, int, int], kept: int) -> Self:
        """The codec whose `learnt()` gave `tensors`, at `retained` 1; axes may be in 16 bits, as once."""
        heads, _, head_dim = shape
        return cls(of_file(tensors, heads, head_dim))

    def at(self, retained: float, lean: bool = False) -> Self:
        """This codec at another share of the bytes.

        Args:
            retained: that share.
            lean: whether axes that get no bits then are let go.

        Raises:
            CapsightError: this codec has let its own go.
            OptionError: `retained` is not in (0, 1], or too small.
        """
        return type(self)(self.whole(), retained, lean)

    def learnt(self) -> dict[str, Tensor]:
        """All that was learnt, as files have it."""
        return for_file(self.whole())

    def whole(self) -> dict[str, Tensor]:
        """All that was learnt, by name: `state_dict()` with all K axes.

        Raises:
            CapsightError: this codec has let some go.
        """
        if self._others is None:
            raise CapsightError("axes that get no bits were left in the file; load the capsule again")
        held = self.axes.cpu(), self.steps.cpu()
        axes, steps = (torch.cat(x, dim) for dim, x in enumerate(zip(held, self._others, strict=True)))
        return self.state_dict() | {"axes": axes, "steps": steps}

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
        back = positions.tables(self.rotary, back=True)
        held = held or Gathered.none(self.mean, len(keys), self.levels.rank)
        held.add(*self._centred(keys[:, :, 0], values[:, :, 0], back), self.unit_axes())
        return held

    def unit_axes(self) -> Tensor:
        """This layer's columns of U^T: float32 `[R, 2 H D]`."""
        return numbers(self.axes, self.steps * self.weight[:, None], torch.float32).flatten(1)

    def _centred(self, keys: Tensor, values: Tensor, tables: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """W (x - mean) `[T, 2 H D]` and the sum of its squares, of `[T, H, D]`; `tables` undo RoPE."""
        if supports(keys):
            how = self.rotary.interleaved, self.mean, self.weight, self._dtype
            return centre(keys, values, tables, *how)
        weight = self.weight[:, None, None]  # [2, 1, 1]
        turned = self.rotary.turn(keys.transpose(0, 1), *tables).transpose(0, 1)
        x = (torch.stack((turned.to(self.mean), values.to(self.mean)), 1) - self.mean) * weight
        return x.flatten(1).to(self._dtype if x.device.type == "cpu" else x.dtype), x.square().sum()

    @classmethod
    def encode_gathered(cls, codecs: Sequence[Any], held: Gathered, runs: Sequence[Run]) -> list[Payload]:
        """Store latents that all layers have added to; least squares, where axes are coarse."""
        first, latents = codecs[0], least_squares(held.sum(), codecs)
        held.compare(latents, typical_loss(first))
        codes, scales = pack(latents, first.levels)
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
        both = (self.axes.permute(1, 2, 3, 0), self.steps, self.mean)  # [2, H, D, R], [2, R], [2, H, D]
        return LayerBasis(*(x[kind] for kind in range(2) for x in both))

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
        latents = payload.open.latents
        payload.open.left -= 1
        if payload.open.left <= 0:
            payload.open = None
        return latents

    def encode(self, keys: Tensor, values: Tensor) -> Payload:
        """Not encoded layer by layer: see `gather`."""
        raise CapsightError("the joint codec stores all layers at once")

    def template(self, heads: int, head_dim: int, dtype: torch.dtype) -> Payload:
        """The latent of one token."""
        stored = pack(torch.zeros(1, self.levels.rank, device=self.mean.device), self.levels)
        return JointPayload(dict(zip(("codes", "scales"), stored, strict=True)))

    def expand(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Keys before RoPE and values float32 `[T, H, D]` of latents `[T, R]`."""
        axes = numbers(self.axes, self.steps, latents.dtype).flatten(1)  # [R, 2 H D]
        both = (latents.to(axes.device) @ axes).view(-1, *self.mean.shape) + self.mean
        return both[:, 0], both[:, 1]

    def payload_nbytes(self, heads: int, head_dim: int, itemsize: int) -> float:
        """Bytes of a token, shared out over the layers."""
        return self.levels.nbytes / self.layers_together
