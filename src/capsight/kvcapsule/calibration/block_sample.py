"""`BlockSample`: a few calibration blocks of every layer, on which the errors of codecs are measured."""

from __future__ import annotations

import random
from collections.abc import Mapping

import torch
from torch import Tensor

from capsight.kvcapsule.codecs import LayerCodec

_BLOCKS = 32  # at most: their keys and values are held until the pass is over


class BlockSample:
    """At most 32 blocks, the same in all layers; each block seen is as likely as any other to be kept."""

    def __init__(self) -> None:
        """Start empty."""
        self._seen = 0
        self._blocks: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def add(self, found: Mapping[int, tuple[Tensor, Tensor]]) -> None:
        """See the keys and values `[M, H, N, D]` of the same M blocks in every layer (reservoir sampling)."""
        for block in range(len(next(iter(found.values()))[0]) if found else 0):
            place = self._seen
            if place >= _BLOCKS:  # seeded by the count, so that a pass can go on from a `state`
                place = random.Random(self._seen).randrange(self._seen + 1)
            self._seen += 1
            if place >= _BLOCKS:
                continue
            for layer, (keys, values) in found.items():
                own = self._blocks.setdefault(layer, [])
                own[place : place + 1] = [(keys[block].cpu().clone(), values[block].cpu().clone())]

    def state(self) -> tuple[int, dict[int, tuple[Tensor, Tensor]]]:
        """How many blocks were seen, and keys and values `[M, H, N, D]` of those kept, by layer."""
        return self._seen, {
            layer: (torch.stack([keys for keys, _ in own]), torch.stack([values for _, values in own]))
            for layer, own in self._blocks.items()
        }

    def restore(self, seen: int, kept: Mapping[int, tuple[Tensor, Tensor]]) -> None:
        """Go on from a `state`."""
        self._seen = seen
        self._blocks = {layer: list(zip(*pair, strict=True)) for layer, pair in kept.items()}

    def blocks(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of one layer: float32 `[M, H, N, D]` each."""
        keys, values = zip(*self._blocks[layer], strict=True)
        return torch.stack(keys).float(), torch.stack(values).float()


@torch.no_grad()
def relative_error(codec: LayerCodec, keys: Tensor, values: Tensor) -> float:
    """Squared error of the blocks `[M, H, N, D]` after encoding and decoding.

    In units of their variance about the mean of each channel, per KV head; the mean over heads, keys and
    values. 0 is perfect, 1 is as bad as the mean.
    """
    rebuilt = codec.decode(codec.encode(keys, values))
    shares = []
    for x, again in zip((keys, values), rebuilt, strict=True):
        spread = (x - x.mean((0, 2), keepdim=True)).square().sum((0, 2, 3))  # [H]
        error = (x - again).square().sum((0, 2, 3))
        shares.append(error / torch.where(spread > 0, spread, 1.0))
    return float(torch.cat(shares).mean())
