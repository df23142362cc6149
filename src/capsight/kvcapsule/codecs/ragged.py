"""`RaggedPayload`: capsules of blocks that keep different numbers of tokens, packed without padding."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from capsight.kvcapsule.codecs.base import index_dtype
from capsight.kvcapsule.codecs.block import Payload

PER_BLOCK = ("counts", "keys.step", "keys.low")
"""Tensors with the blocks along their first axis; all others have the entries there."""

_STEP = 8  # blocks whose counts are in one stretch of this length are padded to the same width


@dataclass(frozen=True, slots=True, eq=False)
class RaggedPayload(Payload):
    """E kept entries of M blocks, ordered by block, then head, then position.

    An entry is one token of all heads (`counts` is `[M, 1]`) or of one head (`[M, H]`).

    Tensors:
        keys, values: `[E, H, D]` or `[E, D]`.
        kept: `[E]`, position in the block (uint8 up to N = 256).
        counts: int `[M, 1 or H]`, entries of each block.
    """

    @classmethod
    def pack(cls, keys: Tensor, values: Tensor, keep: Tensor, counted: torch.dtype = torch.int32) -> Self:
        """The entries that `keep` (bool `[M, 1 or H, N]`) names of blocks `[M, 1 or H, N, ...]`.

        Args:
            keys: the blocks' keys.
            values: the blocks' values.
            keep: what to keep.
            counted: dtype of the counts.
        """
        return cls(
            {
                "keys": keys[keep],
                "values": values[keep],
                "kept": keep.nonzero()[:, 2].to(index_dtype(keep.shape[2])),
                "counts": keep.sum(2, dtype=counted),
            }
        )

    @property
    def lengths(self) -> Tensor:
        """Entries of each block: int64 `[M]`."""
        return self.tensors["counts"].sum(1)

    def owners(self) -> Tensor:
        """Which of the M blocks, or of their M * H heads, each entry belongs to: int64 `[E]`."""
        counts = self.tensors["counts"].flatten().long()
        return torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)

    def slots(self, size: int) -> Tensor:
        """Flat positions of the entries in `[M, 1 or H, N]` with N = `size`: int64 `[E]`."""
        return self.owners() * size + self.tensors["kept"]

    def mask(self, size: int) -> Tensor:
        """Which tokens are kept: bool `[M, 1 or H, N]` with N = `size`."""
        counts = self.tensors["counts"]
        keep = torch.zeros(counts.numel() * size, dtype=torch.bool, device=counts.device)
        keep[self.slots(size)] = True
        return keep.view(*counts.shape, size)

    def side_by_side(self, blocks: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The entries of some blocks (int64 `[m]`; None for all), padded to the longest of these.

        Returns:
            int64 `[m, R]`, the entries, the last one of a block repeated; bool `[m, R]`, False for repeats.
        """
        lengths = self.lengths
        first = lengths.cumsum(0) - lengths
        if blocks is not None:
            lengths, first = lengths[blocks], first[blocks]
        place = torch.arange(int(lengths.max()) if len(lengths) else 0, device=lengths.device)
        return first[:, None] + place.minimum(lengths[:, None] - 1), place < lengths[:, None]

    def alike(self) -> Iterator[Tensor]:
        """All blocks in groups, int64 `[m]`, that keep nearly the same number of entries."""
        stretch = (self.lengths - 1) // _STEP
        for each in stretch.unique().tolist():
            yield (stretch == each).nonzero()[:, 0]

    def select(self, index: Tensor) -> Self:
        """The blocks at `index` int64 `[M']`, in that order."""
        lengths = self.lengths
        starts = lengths.cumsum(0) - lengths
        taken = lengths[index]
        shift = starts[index] - (taken.cumsum(0) - taken)
        entries = torch.arange(int(taken.sum()), device=index.device) + shift.repeat_interleave(taken)
        return type(self)(
            {name: x[index if name in PER_BLOCK else entries] for name, x in self.tensors.items()}
        )
