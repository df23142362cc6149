"""Where blocks lie in their images, and what follows from it: keys before RoPE, and blocks that are tiles."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from capsight.kvcapsule.codecs import BlockCodec, Payload
from capsight.kvcapsule.plan import Run
from capsight.layout import PromptLayout


class Place(NamedTuple):
    """One run of an image.

    Attributes:
        first: M-RoPE position of the image: of its first token, in all three parts.
        height, width: its grid in tokens.
        number: which run of the image it is, from 0.
    """

    first: int
    height: int
    width: int
    number: int


def places(layout: PromptLayout, block_size: int) -> dict[Run, Place]:
    """The place of every run of `block_size` tokens; for still images with Qwen's M-RoPE.

    Text moves all three parts of a position on by one a token, an image by the longer side of its grid.
    """
    found = {}
    for index, row in enumerate(layout.rows):
        position, at = 0, row.pad_left
        for block in row.blocks:
            first = position + block.start - at
            _, height, width = block.grid
            for number in range(block.num_tokens // block_size):
                run = Run(index, block.start + number * block_size, block_size)
                found[run] = Place(first, height, width, number)
            position, at = first + max(height, width), block.end
    return found


class Arrangement(Protocol):
    """Another form of the blocks `[M, H, N, D]` of a prompt, and the way back; `place` is int `[M, 4]`."""

    def there(self, keys: Tensor, values: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
        """Blocks as they are stored."""
        ...

    def back(self, keys: Tensor, values: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
        """Blocks as attention has them."""
        ...


class BeforeRope:
    """Keys are stored as they are before RoPE turns them; turning them again is exact up to rounding."""

    def __init__(self, rotary: Any) -> None:
        """Take the rotary embedding of the language model: `(x, positions [3, B, S]) -> cos, sin`."""
        self._rotary = rotary

    def there(self, keys: Tensor, values: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
        """Turn keys back."""
        cos, sin = self._angles(keys, place)
        return (keys * cos - _half(keys) * sin) / (cos.square() + sin.square()), values

    def back(self, keys: Tensor, values: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
        """Turn keys as the model does."""
        cos, sin = self._angles(keys, place)
        return keys * cos + _half(keys) * sin, values

    def _angles(self, keys: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = self._rotary(keys, mrope_positions(place, keys.shape[2]))  # [M, N, D] each
        return cos[:, None], sin[:, None]


def mrope_positions(place: Tensor, block_size: int) -> Tensor:
    """M-RoPE positions of the tokens of blocks at `place` `[M, 4]`: int64 `[3, M, N]`."""
    first, height, width, number = place.long()[:, :, None].unbind(1)  # [M, 1]
    token = number * block_size + torch.arange(block_size)  # [M, N]
    row = (token // width) % height
    return first + torch.stack([torch.zeros_like(token), row, token % width])


def _half(x: Tensor) -> Tensor:
    left, right = x.chunk(2, -1)
    return torch.cat([-right, left], -1)


class Tiles:
    """Blocks are tiles of h x w tokens of an image instead of runs, where tiles cover the image."""

    def __init__(self, height: int, width: int, keys: bool) -> None:
        """Choose the tile; values are always tiled, keys if so asked."""
        self._height, self._width, self._keys = height, width, keys

    def there(self, keys: Tensor, values: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
        """Runs to tiles."""
        slots = self._slots(place, keys.shape[2])
        return (_taken(keys, slots) if self._keys else keys), _taken(values, slots)

    def back(self, keys: Tensor, values: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
        """Tiles to runs."""
        slots = self._slots(place, keys.shape[2]).argsort()
        return (_taken(keys, slots) if self._keys else keys), _taken(values, slots)

    def _slots(self, place: Tensor, size: int) -> Tensor:
        """Where the tokens of tiles lie among those of the runs: int64 `[M * N]`, a permutation."""
        slots = torch.arange(len(place) * size).view(len(place), size)
        for index, (_, height, width, number) in enumerate(place.tolist()):
            if height % self._height or width % self._width or height * width % size:
                continue
            grid = torch.arange(height * width).view(height // self._height, self._height, -1, self._width)
            tiles = grid.transpose(1, 2).reshape(-1, size)
            slots[index] = (index - number) * size + tiles[number]
        return slots.flatten()


def _taken(x: Tensor, slots: Tensor) -> Tensor:
    flat = x.transpose(1, 2).flatten(0, 1)[slots]  # [M * N, H, D]
    return flat.unflatten(0, (len(x), -1)).transpose(1, 2)


class ArrangedCodec(BlockCodec):
    """A codec that stores blocks in another arrangement; where they lie is stored with them (16 bytes).

    Runs of one image stay together, as caches keep them.
    """

    name: ClassVar[str] = "arranged"

    def __init__(self, inner: BlockCodec, arrangement: Arrangement, at: Mapping[Run, Place]) -> None:
        """Wrap `inner` for the prompts whose runs lie `at` these places."""
        super().__init__(inner.block_size)
        self.inner, self._arrangement, self._at = inner, arrangement, at

    def encode_runs(self, keys: Tensor, values: Tensor, runs: Sequence[Run]) -> Payload:
        """Arrange blocks `[M, H, N, D]`, then store them."""
        place = torch.tensor([self._at[run] for run in runs], dtype=torch.int32)
        payload = self.inner.encode_runs(*self._arrangement.there(keys, values, place), runs)
        return Payload({**payload.tensors, "place": place})

    def decode(self, payload: Payload) -> tuple[Tensor, Tensor]:
        """Open them, and arrange them back."""
        inner = {name: tensor for name, tensor in payload.tensors.items() if name != "place"}
        return self._arrangement.back(*self.inner.decode(Payload(inner)), payload.tensors["place"])
