"""`RaggedPayload`: capsules that keep different numbers of tokens, packed without padding."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Self

import torch
from torch import Tensor

from capsight.kvcapsule.attention import BlockRows
from capsight.kvcapsule.attention.native import Source, Steps
from capsight.kvcapsule.codecs.base import index_dtype
from capsight.kvcapsule.codecs.block import Payload


@dataclass(eq=False)
class RaggedPayload(Payload):
    """E kept entries of M blocks, each one token of one KV head.

    All entries of head 0 come first, block by block and in order of position, then those of head 1: what a
    head keeps of a row is one piece of memory.

    Tensors:
        keys, values: `[E, D]`.
        kept: `[E]`, position in the block (uint8 up to N = 256).
        counts: int `[M, H]`, entries of each head of each block.
    """

    @classmethod
    def pack(cls, keys: Tensor, values: Tensor, keep: Tensor, counted: torch.dtype = torch.int32) -> Self:
        """The entries that `keep` (bool `[M, H, N]`) names of blocks `[M, H, N, D]`.

        Args:
            keys: the blocks' keys.
            values: the blocks' values.
            keep: what to keep.
            counted: dtype of the counts.
        """
        blocks, heads, size = keep.shape
        entries = keep.transpose(0, 1).flatten().nonzero()[:, 0]  # [E], in [H, M, N]
        rows, position = (x.index_select(0, entries) for x in _places(blocks, heads, size, keep.device))
        return cls(
            {
                "keys": keys.transpose(1, 2).flatten(0, 2).index_select(0, rows),
                "values": values.transpose(1, 2).flatten(0, 2).index_select(0, rows),
                "kept": position,
                "counts": keep.sum(2, dtype=counted),
            }
        )

    @property
    def lengths(self) -> Tensor:
        """Entries of each head of each block, as they lie in memory: int64 `[H * M]`."""
        return self.tensors["counts"].T.flatten().long()

    def owners(self) -> Tensor:
        """Which head and block each entry belongs to, of the H * M in their order: int64 `[E]`."""
        lengths = self.lengths
        return torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)

    def slots(self, size: int) -> Tensor:
        """Flat positions of the entries, ascending, in `[H, M, N]` with N = `size`: int64 `[E]`."""
        return self.owners() * size + self.tensors["kept"]

    def mask(self, size: int) -> Tensor:
        """Which tokens are kept: bool `[M, H, N]` with N = `size`."""
        blocks, heads = self.tensors["counts"].shape
        keep = torch.zeros(heads * blocks * size, dtype=torch.bool, device=self.tensors["kept"].device)
        keep[self.slots(size)] = True
        return keep.view(heads, blocks, size).transpose(0, 1)

    def spread(self, name: str, size: int) -> Tensor:
        """The entries of a tensor in their places, zeros elsewhere: `[M, H, N, D]` with N = `size`."""
        x, (blocks, heads) = self.tensors[name], self.tensors["counts"].shape
        full = x.new_zeros(heads * blocks * size, *x.shape[1:])
        full[self.slots(size)] = x
        return full.view(heads, blocks, size, *x.shape[1:]).transpose(0, 1)

    def source(self, rows: BlockRows, batch: int, steps: Steps | None = None) -> Source:
        """The entries as native attention reads them: every piece is of one head."""
        counts = rows.sums(self.tensors["counts"], batch)
        starts = (counts.T.flatten().cumsum(0).view(counts.T.shape).T - counts).contiguous()
        keys, values = (x[:, None] for x in self.stored)
        return Source(keys, values, starts, counts, steps)

    def select(self, index: Tensor) -> Self:
        """The blocks at `index` int64 `[M']`, in that order."""
        lengths = self.lengths
        starts = lengths.cumsum(0) - lengths
        by_block = self.tensors["counts"].T.shape  # H, M
        starts, taken = (x.view(by_block)[:, index].flatten() for x in (starts, lengths))
        entries = _ranges(starts, taken)
        return type(self)(
            {name: x[index if name == "counts" else entries] for name, x in self.tensors.items()}
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
        joined = {name: torch.cat([x, other.tensors[name]]) for name, x in self.tensors.items()}
        return type(self)({name: x if name == "counts" else x[entries] for name, x in joined.items()})


def _ranges(starts: Tensor, lengths: Tensor) -> Tensor:
    """`starts[i]` to `starts[i] + lengths[i]` (exclusive), end to end: int64."""
    shift = starts - (lengths.cumsum(0) - lengths)
    return torch.arange(int(lengths.sum()), device=starts.device) + shift.repeat_interleave(lengths)


@lru_cache(maxsize=1)
def _places(blocks: int, heads: int, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Of the entries of `[H, M, N]`: their rows in `[M, N, H]`, as caches lie; their positions in blocks."""
    rows = torch.arange(blocks * size * heads, device=device).view(-1, heads).T.flatten()
    return rows, torch.arange(size, dtype=index_dtype(size), device=device).repeat(heads * blocks)
