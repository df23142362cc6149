"""Latents that all layers share: as stored, where they belong, and what makes keys and values of them."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

PAD = 16
"""Channels of tables are a multiple of it."""


class PackedLatents(NamedTuple):
    """Latents of T tokens as they are stored.

    Attributes:
        codes: uint8 `[T, C]`: first coordinates in 8 bits, then 4, then 2.
        scales: float16 `[T, R / 32]`, of each 32 coordinates.
        counts: coordinates in 8, 4 and 2 bits, R in all; multiples of 32.
        points: the two sizes that two bits stand for.
    """

    codes: Tensor
    scales: Tensor
    counts: tuple[int, int, int]
    points: tuple[float, float]


class Turning(Protocol):
    """How keys are turned: `Rotary` of the codecs is one."""

    frequencies: Tensor  # float64 [P], radians per position
    axes: Tensor  # int64 [P], which of t, h, w turns a pair
    interleaved: bool  # pairs are channels (2 i, 2 i + 1); else (i, i + P)
    scaling: float


@dataclass(frozen=True, eq=False)
class LatentTokens:
    """Places of T tokens, the same for all layers, and how they turn keys.

    Attributes:
        starts: int64 `[B]`, first token of each row.
        counts: int64 `[B]`, how many it has.
        positions: int64 `[3, T]`.
        turning: how keys are turned.
    """

    starts: Tensor
    counts: Tensor
    positions: Tensor
    turning: Turning

    def __getstate__(self) -> dict[str, Any]:
        """Without what follows from it: a copy makes that anew, and addresses would be others."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def channels(self, size: int) -> list[Tensor]:
        """The channels of each axis, of `size` in all, int64: first halves of pairs, second halves, then,
        on the first axis, all that are not turned.
        """
        axes, inter, channels = self.turning.axes, self.turning.interleaved, []
        for pairs in self.pairs:
            channels.append(torch.cat([2 * pairs, 2 * pairs + 1] if inter else [pairs, pairs + len(axes)]))
        return [torch.cat((channels[0], torch.arange(2 * len(axes), size))), *channels[1:]]

    @cached_property
    def pairs(self) -> list[Tensor]:
        """The pairs of each axis, int64, those that turn fastest first."""
        sizes = self.turning.frequencies.abs()
        own = [(self.turning.axes == axis).nonzero().flatten() for axis in range(3)]
        return [pairs[sizes[pairs].argsort(descending=True, stable=True)] for pairs in own]

    @cached_property
    def frequencies(self) -> list[Tensor]:
        """Of `pairs`, without their signs: float64."""
        return [self.turning.frequencies[pairs].abs().double() for pairs in self.pairs]

    @cached_property
    def tables(self) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
        """Which of the places of each axis a token has, int32 `[3, T]`; their cosines and sines, scaled, of
        `pairs`; and their positions, float64.

        An axis that turns nothing has one place.
        """
        which, cosines, sines, spots = [], [], [], []
        for pairs, coords in zip(self.pairs, self.positions, strict=True):
            places, index = (coords if len(pairs) else torch.zeros_like(coords)).unique(return_inverse=True)
            angles = places[:, None] * self.turning.frequencies[pairs]
            which.append(index.int())
            cosines.append((angles.cos() * self.turning.scaling).float())
            sines.append((angles.sin() * self.turning.scaling).float())
            spots.append(places.double())
        return torch.stack(which), cosines, sines, spots

    def native(self, size: int) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
        """For `size` channels: places, `channels`, and cosines and sines `[places, channels, filled up]`."""
        if "_native" not in self.__dict__ or self.__dict__["_native"][0] != size:
            places, *tables, _ = self.tables
            channels = self.channels(size)
            made: list[list[Tensor]] = [[], []]
            for of_axis, cosine, sine in zip(channels, *tables, strict=True):
                rest = len(of_axis) - 2 * cosine.shape[1]
                for to, parts, of_rest in ((0, (cosine, cosine), 1.0), (1, (sine, -sine), 0.0)):
                    wide = torch.cat((*parts, torch.full((len(cosine), rest), of_rest)), 1)
                    made[to].append(torch.nn.functional.pad(wide, (0, -len(of_axis) % PAD)).contiguous())
            self.__dict__["_native"] = size, (places, channels, *made)
        return self.__dict__["_native"][1]


@dataclass(frozen=True, eq=False)
class LayerBasis:
    """What makes one layer's keys and values of latents.

    Attributes:
        key_axes: int8 `[H, D, R]`, contiguous; times the steps they are numbers.
        key_steps: float32 `[R]`, contiguous.
        key_mean: float32 `[H, D]`, contiguous.
        value_axes: like `key_axes`.
        value_steps: like `key_steps`.
        value_mean: like `key_mean`.
    """

    key_axes: Tensor
    key_steps: Tensor
    key_mean: Tensor
    value_axes: Tensor
    value_steps: Tensor
    value_mean: Tensor
