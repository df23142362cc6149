"""`BlockSample`: a few calibration blocks of every layer, on which the errors of codecs are measured."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from capsight.kvcapsule.codecs import LayerCodec

_BLOCKS = 32  # at most: their keys and values are held until the pass is over

Blocks = Mapping[int, tuple[Tensor, Tensor]]
"""Keys and values `[M, H, N, D]` of the same M blocks in every layer."""


class BlockSample:
    """At most 32 blocks, the same in all layers; each block seen is as likely as any other to be kept.

    Every block draws a random number, seeded by that of its calibration sample, and the smallest stay; see
    `TokenSample`.
    """

    def __init__(self) -> None:
        """Start empty."""
        self._draws = torch.empty(0, dtype=torch.float64)
        self._blocks: dict[int, tuple[Tensor, Tensor]] = {}

    def add(self, blocks: Blocks, index: int) -> None:
        """See the blocks of the calibration sample with this number."""
        if blocks:
            generator = torch.Generator().manual_seed(index)
            count = len(next(iter(blocks.values()))[0])
            self._merge(torch.rand(count, generator=generator, dtype=torch.float64), blocks)

    def join(self, other: BlockSample) -> None:
        """See what another sample has seen, of other calibration samples."""
        self._merge(other._draws, other._blocks)

    def state(self) -> tuple[list[float], dict[int, tuple[Tensor, Tensor]]]:
        """What the blocks that are kept have drawn, and their keys and values, by layer."""
        return self._draws.tolist(), dict(self._blocks)

    def restore(self, draws: list[float], blocks: Blocks) -> None:
        """Go on from a `state`.

        Raises:
            ValueError: it is malformed.
        """
        self._draws, self._blocks = torch.tensor(draws, dtype=torch.float64), dict(blocks)
        if any(len(x) != len(draws) for pair in blocks.values() for x in pair):
            raise ValueError("the sampled blocks do not fit together")

    def blocks(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of one layer: float32 `[M, H, N, D]` each."""
        keys, values = self._blocks[layer]
        return keys.float(), values.float()

    def _merge(self, draws: Tensor, blocks: Blocks) -> None:
        if len(self._draws) == _BLOCKS:
            smaller = (draws < self._draws[-1]).nonzero()[:, 0]
        else:
            smaller = draws.argsort()[:_BLOCKS]
        if not len(smaller):
            return
        drawn = torch.cat([self._draws, draws[smaller]])
        stay = drawn.argsort()[:_BLOCKS]
        for layer, pair in blocks.items():
            more = [x[smaller.to(x.device)].cpu() for x in pair]
            before = self._blocks.get(layer, [x[:0] for x in more])
            keys, values = (torch.cat(x)[stay] for x in zip(before, more, strict=True))
            self._blocks[layer] = keys, values
        self._draws = drawn[stay]


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
