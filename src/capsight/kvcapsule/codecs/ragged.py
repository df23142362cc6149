"""`RaggedPayload`: capsules that keep different numbers of tokens, packed without padding."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from capsight.kvcapsule.codecs.base import index_dtype
from capsight.kvcapsule.codecs.block import Payload


def per_block(name: str, x: Tensor) -> bool:
    """Whether a tensor has the blocks along its first axis: counts, and groups of a block's keys."""
    return name == "counts" or (name in ("keys.step", "keys.low") and x.ndim == 4)


_STEP = 8  # cells whose counts are in one stretch of this length are padded to the same width


@dataclass(frozen=True, slots=True, eq=False)
class RaggedPayload(Payload):
    """E kept entries of M blocks, packed cell by cell, each cell's in order of position.

    A cell is a block, and an entry one token of all heads (J = 1), or a cell is one head of a block, and an
    entry one token of that head (J = H). All cells of head 0 come first, in the order of the blocks, then
    those of head 1: what a head keeps of a row is one piece of memory.

    Tensors:
        keys, values: `[E, H, D]` or `[E, D]`.
        kept: `[E]`, position in the block (uint8 up to N = 256).
        counts: int `[M, J]`, entries of each cell.
    """

    @classmethod
    def pack(cls, keys: Tensor, values: Tensor, keep: Tensor, counted: torch.dtype = torch.int32) -> Self:
        """The entries that `keep` (bool `[M, J, N]`) names of blocks `[M, J, N, ...]`.

        Args:
            keys: the blocks' keys.
            values: the blocks' values.
            keep: what to keep.
            counted: dtype of the counts.
        """
        cells = keep.transpose(0, 1)  # [J, M, N]
        return cls(
            {
                "keys": keys.transpose(0, 1)[cells],
                "values": values.transpose(0, 1)[cells],
                "kept": cells.nonzero()[:, 2].to(index_dtype(keep.shape[2])),
                "counts": keep.sum(2, dtype=counted),
            }
        )

    @property
    def lengths(self) -> Tensor:
        """Entries of each cell: int64 `[J * M]`."""
        return self.tensors["counts"].T.flatten().long()

    def owners(self) -> Tensor:
        """Which of the J * M cells each entry belongs to: int64 `[E]`."""
        lengths = self.lengths
        return torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)

    def slots(self, size: int) -> Tensor:
        """Flat positions of the entries, ascending, in `[J, M, N]` with N = `size`: int64 `[E]`."""
        return self.owners() * size + self.tensors["kept"]

    def mask(self, size: int) -> Tensor:
        """Which tokens are kept: bool `[M, J, N]` with N = `size`."""
        blocks, each = self.tensors["counts"].shape
        keep = torch.zeros(each * blocks * size, dtype=torch.bool, device=self.tensors["kept"].device)
        keep[self.slots(size)] = True
        return keep.view(each, blocks, size).transpose(0, 1)

    def spread(self, name: str, size: int) -> Tensor:
        """The entries of a tensor in their places, zeros elsewhere: `[M, J, N, ...]` with N = `size`."""
        x, (blocks, each) = self.tensors[name], self.tensors["counts"].shape
        full = x.new_zeros(each * blocks * size, *x.shape[1:])
        full[self.slots(size)] = x
        return full.view(each, blocks, size, *x.shape[1:]).transpose(0, 1)

    def side_by_side(self, cells: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The entries of some cells (int64 `[m]`; None for all), padded to the longest of these.

        Returns:
            int64 `[m, R]`, the entries, the last one of a cell repeated; bool `[m, R]`, False for repeats.
        """
        lengths = self.lengths
        first = lengths.cumsum(0) - lengths
        if cells is not None:
            lengths, first = lengths[cells], first[cells]
        place = torch.arange(int(lengths.max()) if len(lengths) else 0, device=lengths.device)
        return first[:, None] + place.minimum(lengths[:, None] - 1), place < lengths[:, None]

    def alike(self) -> Iterator[Tensor]:
        """All cells in groups, int64 `[m]`, that keep nearly the same number of entries."""
        stretch = (self.lengths - 1) // _STEP
        for each in stretch.unique().tolist():
            yield (stretch == each).nonzero()[:, 0]

    def select(self, index: Tensor) -> Self:
        """The blocks at `index` int64 `[M']`, in that order."""
        lengths = self.lengths
        starts = lengths.cumsum(0) - lengths
        by_block = self.tensors["counts"].T.shape  # J, M
        starts, taken = (x.view(by_block)[:, index].flatten() for x in (starts, lengths))
        entries = _ranges(starts, taken)
        return type(self)(
            {name: x[index if per_block(name, x) else entries] for name, x in self.tensors.items()}
        )

    def join(self, other: Payload) -> Self:
        """These capsules, then the other ones."""
        assert isinstance(other, RaggedPayload)
        starts, taken, first = [], [], 0
        for part in (self, other):
            lengths, by_block = part.lengths, part.tensors["counts"].T.shape
            starts.append((first + lengths.cumsum(0) - lengths).view(by_block))
            taken.append(lengths.view(by_block))
            first += len(part.tensors["kept"])
        entries = _ranges(torch.cat(starts, 1).flatten(), torch.cat(taken, 1).flatten())
        both = {name: torch.cat([x, other.tensors[name]]) for name, x in self.tensors.items()}
        return type(self)({name: x if per_block(name, x) else x[entries] for name, x in both.items()})


def _ranges(starts: Tensor, lengths: Tensor) -> Tensor:
    """`starts[i]` to `starts[i] + lengths[i]` (exclusive), end to end: int64."""
    shift = starts - (lengths.cumsum(0) - lengths)
    return torch.arange(int(lengths.sum()), device=starts.device) + shift.repeat_interleave(lengths)
