"""The whole cache in few bits: no token is dropped, text is stored like images, and all bytes count.

- `kivi-B`: keys channel by channel in groups of 64 tokens, values token by token, B bits with a scale and a
  zero point of 16 bits each (KIVI, https://arxiv.org/abs/2402.02750); nothing of the prompt stays exact.
- `kivi-plain-B`: the same, keys before RoPE (KVQuant, https://arxiv.org/abs/2401.18079).
- `rotated-B`: keys and values of each head and token turned by a randomised Hadamard matrix, then each number
  in the best 2^B levels for a normal distribution, with one norm of 16 bits (TurboQuant,
  https://arxiv.org/abs/2504.19874; QuaRot, https://arxiv.org/abs/2404.00456).

What attention reads is what these bits say; they are counted, not packed.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, DynamicCache

from capsight.kvcapsule.codecs.rotary import Rotary
from capsight.layout import PromptLayout, build_layout
from capsight.layout.positions import rope_positions

GROUP = 64
_POINTS = {
    2: (0.4528, 1.5104),
    3: (0.2451, 0.7560, 1.3439, 2.1520),
    4: (0.1284, 0.3881, 0.6568, 0.9424, 1.2562, 1.6181, 2.0690, 2.7326),
}
"""Positive points of the best quantisers of a normal distribution (Max, 1960)."""


def uniform(x: Tensor, bits: int) -> tuple[Tensor, int]:
    """`[..., n]` in groups of `GROUP` along the last axis, each from its least to its largest number.

    Returns:
        What the bits say, and their bytes.
    """
    count = x.shape[-1]
    groups = pad(x.flatten(0, -2), (0, -count % GROUP), "replicate").unflatten(-1, (-1, GROUP))
    low, high = (groups.amin(-1, keepdim=True).half(), groups.amax(-1, keepdim=True))
    scale = ((high - low) / (2**bits - 1)).half().float().clamp_min(1e-7)
    code = ((groups - low) / scale).round().clamp(0, 2**bits - 1)
    held = (code * scale + low).flatten(-2)[:, :count].view_as(x)
    return held, ceil(x.numel() * bits / 8) + 4 * scale.numel()


def rotated(x: Tensor, bits: int) -> tuple[Tensor, int]:
    """Vectors `[..., D]`, D a power of two, turned; see the top of the file. Returns as `uniform`."""
    size = x.shape[-1]
    turn = _hadamard(size)
    norm = x.norm(dim=-1, keepdim=True).half().float().clamp_min(1e-7)
    points = torch.tensor(_POINTS[bits])
    points = torch.cat((-points.flip(0), points))
    unit = x @ turn * (size**0.5 / norm)
    held = points[torch.bucketize(unit, (points[1:] + points[:-1]) / 2)]
    return held @ turn.T * (norm / size**0.5), ceil(x.numel() * bits / 8) + 2 * norm.numel()


def _hadamard(size: int) -> Tensor:
    """An orthonormal `[D, D]`: random signs, then a Hadamard matrix."""
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    signs = torch.randint(0, 2, (size, 1), generator=torch.Generator().manual_seed(0)) * 2 - 1
    return matrix * signs / size**0.5


class WholeQuantised:
    """A method (`capsight.kvcapsule.CacheMethod`) that stores all tokens of a prompt in `bits` bits."""

    needs_attention = False
    module_nbytes = 0

    def __init__(self, name: str, bits: int, rotary: Rotary) -> None:
        """Choose "kivi", "kivi-plain" or "rotated", and 2, 3 or 4 bits."""
        self.kind, self.bits, self.rotary = name, bits, rotary
        self.name = self.label = f"{name}-{bits}"

    def check_model(self, model: Any) -> None:
        """Every model will do whose layers hold keys and values."""

    def cache(self, inputs: Mapping[str, Any] | PromptLayout, config: PreTrainedConfig) -> Cache:
        """An empty cache."""
        layout = inputs if isinstance(inputs, PromptLayout) else build_layout(inputs, config)
        return WholeCache(self, rope_positions(layout, config)[:, 0], config)

    def stored(self, keys: Tensor, values: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, int]:
        """Keys and values `[H, S, D]`, float32, as stored, and their bytes."""
        if self.kind == "rotated":
            (k, first), (v, second) = (rotated(x, self.bits) for x in (keys, values))
            return k, v, first + second
        tables = self.rotary.tables(positions)
        plain = self.kind == "kivi-plain"
        k = self.rotary.unturn(keys, *tables) if plain else keys
        k, first = uniform(k.mT, self.bits)
        k = self.rotary.turn(k.mT, *tables) if plain else k.mT
        together, second = uniform(values.transpose(0, 1).flatten(1), self.bits)
        return k, together.view_as(values.transpose(0, 1)).transpose(0, 1), first + second


class WholeCache(DynamicCache):
    """A stock cache of what the bits of a prompt say; later tokens are exact.

    Attributes:
        nbytes: bytes of the prompt as counted.
        nbytes_full: its bytes in a stock cache.
    """

    def __init__(self, method: WholeQuantised, positions: Tensor, config: PreTrainedConfig) -> None:
        """Make an empty cache for one prompt whose tokens are at `positions` `[3, S]`."""
        super().__init__(config=config)
        self._method, self._positions = method, positions
        self.nbytes = self.nbytes_full = 0

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Quantise a prompt's `[1, H, S, D]`; what comes after it stays as it is."""
        if self.get_seq_length(layer_idx):
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)
        keys, values, nbytes = self._method.stored(
            key_states[0].float(), value_states[0].float(), self._positions
        )
        self.nbytes += nbytes
        self.nbytes_full += key_states.nbytes + value_states.nbytes
        super().update(keys[None].to(key_states), values[None].to(value_states), layer_idx, *args, **kwargs)
        return key_states, value_states
