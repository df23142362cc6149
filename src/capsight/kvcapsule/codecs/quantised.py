"""`QuantisedCodec`: any codec, with the numbers of its capsules kept in 8 or 4 bits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Self

import torch
from torch import Tensor

from capsight.kvcapsule.attention import BlockRows, KeptTokens, LatentBlocks
from capsight.kvcapsule.attention.native import Source, Steps
from capsight.kvcapsule.codecs.base import LayerCodec
from capsight.kvcapsule.codecs.block import BlockCodec, Payload
from capsight.kvcapsule.codecs.quantise import Quantised, check_bits, dequantise, quantise
from capsight.kvcapsule.plan import Run

_AXES = {"keys": 1, "values": 3, "latent": 3}  # of [M, r, H, D]: the axis that a group spans


class QuantisedCodec(BlockCodec):
    """Stores what another codec stores, keys and values in 8 or 4 bits, and opens it before that codec does.

    Keys are quantised per channel, over the r kept tokens of a block, and values (latent ones, too) per
    token and head, over its D channels: keys have channels of large magnitude, values have not (KIVI,
    arXiv 2402.02750). A head that keeps tokens of its own may keep one of a block, too few for a group, so
    its keys are quantised per token, too, in units of what is usual for each channel (`typical_keys`).
    Kept tokens are not copied bit for bit any more; where they lie stays exact.

    Capsules, for each of `keys` and `values` (or `latent`), beside what is not quantised:
        *.levels: uint8 `[M, r, H, D]`, in 4 bits `[M, r, H, ceil(D / 2)]`.
        *.step, *.low: `[M, 1, H, D]` for keys, `[M, r, H, 1]` for values, in the dtype of the blocks.
        Of `heads` uint8 `[E, D]` or `[E, ceil(D / 2)]`, and `[E, 1]`, a `RaggedPayload`.
    """

    name: ClassVar[str] = "quantised"

    def __init__(self, inner: LayerCodec, bits: int) -> None:
        """Wrap `inner`.

        Raises:
            OptionError: `bits` is neither 8 nor 4.
        """
        super().__init__(inner.block_size)
        check_bits(bits)
        self.inner, self.bits, self.layers_together = inner, bits, inner.layers_together

    @classmethod
    def ready(cls, codecs: Sequence[Self]) -> Sequence[Self]:
        """These over inner codecs that are ready."""
        inner = type(codecs[0].inner).ready([codec.inner for codec in codecs])
        return [cls(knowing, codec.bits) for knowing, codec in zip(inner, codecs, strict=True)]

    def encode_runs(self, keys: Tensor, values: Tensor, runs: Sequence[Run]) -> Payload:
        """Make capsules of blocks `[M, H, N, D]` and quantise them."""
        return self.closed(self.inner.encode_runs(keys, values, runs))

    @classmethod
    def encode_layers(
        cls,
        codecs: Sequence[BlockCodec],
        keys: Sequence[Tensor],
        values: Sequence[Tensor],
        runs: Sequence[Run],
    ) -> list[Payload]:
        """Make capsules in several layers as the inner codecs do, and quantise them."""
        outer = [codec for codec in codecs if isinstance(codec, cls)]
        payloads = type(outer[0].inner).encode_layers([codec.inner for codec in outer], keys, values, runs)
        return [codec.closed(payload) for codec, payload in zip(outer, payloads, strict=True)]

    def closed(self, payload: Payload) -> Payload:
        """Capsules of the inner codec, quantised."""
        typical = self.inner.typical_keys(payload)
        tensors: dict[str, Tensor] = {}
        for name, x in payload.tensors.items():
            if name not in _AXES:
                tensors[name] = x
                continue
            axis = _AXES[name]
            if typical is not None:  # an entry is one token of one head, [E, D]
                axis = 1
                x = ((x - typical[0]) / typical[1]).to(x.dtype) if name == "keys" else x
            parts = quantise(x, self.bits, axis)
            tensors |= {f"{name}.{part}": tensor for part, tensor in parts._asdict().items()}
        return type(payload)(tensors)

    def opened(self, payload: Payload) -> Payload:
        """The capsules as the inner codec has them, in the dtype of the blocks."""
        tensors, typical = dict(payload.tensors), self.inner.typical_keys(payload)
        channels = (tensors["keys.step"] if typical is None else typical[0]).shape[-1]
        for name in _AXES:
            if f"{name}.levels" in tensors:
                parts = Quantised(*(tensors.pop(f"{name}.{part}") for part in Quantised._fields))
                tensors[name] = dequantise(parts, self.bits, channels)
        if typical is not None:
            keys = tensors["keys"]
            tensors["keys"] = torch.addcmul(typical[0], keys, typical[1]).to(keys.dtype)
        return type(payload)(tensors)

    def decode(self, payload: Payload) -> tuple[Tensor, Tensor]:
        """Dequantise, then decode: keys and values `[M, H, N, D]`."""
        return self.inner.decode(self.opened(payload))

    def latent(self, payload: Payload) -> LatentBlocks | KeptTokens:
        """Dequantise, then as the inner codec: attention reads `[M, r, H, D]` numbers, not N tokens."""
        return self.inner.latent(self.opened(payload))

    def source(
        self, payload: Payload, rows: BlockRows, batch: int, steps: Steps | None = None
    ) -> Source | None:
        """The levels of the inner codec's tokens as they are."""
        tensors = payload.tensors
        if "keys.step" not in tensors:
            return None
        key, value = ((tensors[f"{name}.step"], tensors[f"{name}.low"]) for name in ("keys", "values"))
        typical = self.inner.typical_channels()
        if typical is not None:
            mean, size = typical
            steps = Steps(self.bits, *value, *key, size[None], mean[None])
        else:  # of [M, r, H, D]: keys by channel of a block, values by token and head
            step, low = (x[..., 0].flatten(0, 1) for x in value)
            size, mean = (x[:, 0] for x in key)
            steps = Steps(self.bits, step, low, size=size, mean=mean, group=value[0].shape[1])
        return self.inner.source(payload, rows, batch, steps)

    def bias(self, payload: Payload) -> Tensor | None:
        """That of the inner codec, which follows from positions alone."""
        return self.inner.bias(payload)

    def hides(self, payload: Payload) -> bool:
        """Whether the inner codec does."""
        return self.inner.hides(payload)

    def payload_nbytes(self, heads: int, head_dim: int, itemsize: int) -> float:
        """Bytes of one block's capsule, for H heads of size D and steps of `itemsize` bytes."""
        kept = self.inner.kept
        exact = self.inner.payload_nbytes(heads, head_dim, itemsize) - 2 * kept * heads * head_dim * itemsize
        levels = 2 * kept * heads * (head_dim if self.bits == 8 else (head_dim + 1) // 2)
        groups = heads * ((kept if self.inner.keys_by_token else head_dim) + kept)  # of keys, of values
        return exact + levels + 2 * groups * itemsize
