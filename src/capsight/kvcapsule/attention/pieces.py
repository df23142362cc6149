"""How pieces of memory that differ in length are cut, so that few calls of attention read them all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, pairwise

import torch
from torch import Tensor

from capsight.kvcapsule.attention.blocks import BlockRows, KeptTokens

_CHUNKS = 512, 256, 128
"""Tokens of a chunk: the first of these of which a piece has sixteen on average, or the last."""

_SHORT = 3 * 2**20
"""Bytes of keys, padded, that are better copied."""


@dataclass(frozen=True, slots=True, eq=False)
class Runs:
    """Runs of tokens, to be copied side by side.

    Attributes:
        index: int64 `[R * W]`, the tokens of R runs, each padded to the W of the longest.
        hidden: float32 `[R, W]`, minus infinity for padding, else 0: what is added to scores.
        none: bool `[R, 1, 1]`, which runs are empty; None if none is.
    """

    index: Tensor
    hidden: Tensor
    none: Tensor | None

    @classmethod
    def of(cls, runs: Sequence[tuple[int, int]], device: torch.device) -> Runs:
        """Runs from their first token to their last + 1; some may have none."""
        start, end = torch.tensor(runs, device=device).T[..., None]  # [R, 1] each
        place = torch.arange(max(last - first for first, last in runs), device=device)
        index = (start + place).minimum(end - 1).clamp_min(0)
        none = (start == end)[..., None] if any(first == last for first, last in runs) else None
        hidden = torch.zeros(index.shape, device=device).masked_fill(start + place >= end, -torch.inf)
        return cls(index.flatten(), hidden, none)

    def gather(self, x: Tensor) -> Tensor:
        """These of tokens `[E, D]`: `[R, W, D]`."""
        gathered = x.index_select(0, self.index).unflatten(0, self.hidden.shape)
        # Padding repeats a run's last token; runs without any must not see, as nothing times NaN, another's.
        return gathered.masked_fill(self.none, 0) if self.none is not None else gathered


@dataclass(frozen=True, slots=True, eq=False)
class Chunks:
    """H B pieces, head by head, cut into chunks of equal length where they lie.

    Attention of piece `row * H + head` is added up of that over parts: chunks, then runs, then the pieces'
    exact tokens.

    Attributes:
        size: tokens of a chunk.
        count: chunks (n), from the first token on; what follows is less than a chunk.
        rest: what lies in chunks of several pieces, or in none (R runs).
        piece: int64 `[n + R]`, whose tokens they are; of a chunk that several share, whose the first is.
        parts: int64 `[B H * T]`, which of the n + R + B H parts are of a piece: its own in order, the last of
            them (n + R + its number) again until there are T.
        none: float32 `[B H, T, 1]`, 0, or minus infinity where a part is there again.
    """

    size: int
    count: int
    rest: Runs | None
    piece: Tensor
    parts: Tensor
    none: Tensor

    @classmethod
    def of(cls, sizes: Sequence[Sequence[int]], device: torch.device) -> Chunks:
        """Cut pieces of `sizes` tokens, `[H][B]`; some may be empty, but not all."""
        heads, batch, total = len(sizes), len(sizes[0]), sum(map(sum, sizes))
        size = next((size for size in _CHUNKS if total >= 16 * size * heads * batch), _CHUNKS[-1])
        size, ends = min(size, total), list(accumulate(chain.from_iterable(sizes)))  # one chunk at least
        firsts, whole = _first_pieces(ends, size)
        rest = list(_rest(ends, size))
        piece = [row * heads + head for head in range(heads) for row in range(batch)]
        asking = [piece[first] for first in (*firsts, *(run[0] for run in rest))]
        by_piece: list[list[int]] = [[] for _ in piece]
        for part, (which, alone) in enumerate(zip(asking, [*whole, *(True for _ in rest)], strict=True)):
            if alone:  # what several pieces share is of none of them: their runs have it
                by_piece[which].append(part)
        most = 1 + max(map(len, by_piece))
        filled = [parts + [len(asking) + p] * (most - len(parts)) for p, parts in enumerate(by_piece)]
        again = [[place > len(parts) for place in range(most)] for parts in by_piece]
        none = torch.zeros(len(by_piece), most, device=device)
        return cls(
            size,
            len(firsts),
            Runs.of([run[1:] for run in rest], device) if rest else None,
            torch.tensor(asking, device=device),
            torch.tensor(filled, device=device).flatten(),
            none.masked_fill(torch.tensor(again, device=device), -torch.inf)[..., None],
        )

    def where_they_lie(self, x: Tensor) -> Tensor:
        """All chunks of tokens `[E, D]`: `[n, size, D]`, no copy."""
        return x[: self.count * self.size].unflatten(0, (self.count, self.size))


def pieces_of(tokens: KeptTokens, rows: BlockRows, batch: int) -> Runs | Chunks | None:
    """How what B rows and H heads keep is best read; remembered, since no step of decoding changes it.

    Returns:
        B H runs, row by row, where they are short; else chunks of H B pieces, head by head, as they lie in
        memory. None if nothing is kept.
    """
    if not len(tokens.keys):
        return None
    if tokens.counts not in rows.plans:
        rows.plans[tokens.counts] = _pieces_of(tokens, rows, batch)
    plan: Runs | Chunks = rows.plans[tokens.counts]
    return plan


def _pieces_of(tokens: KeptTokens, rows: BlockRows, batch: int) -> Runs | Chunks:
    sizes = []  # [H][B], those of rows that have none, too
    for head_sizes in tokens.sizes(rows):
        of_row = dict(zip(rows.spans, head_sizes, strict=True))
        sizes.append([of_row.get(row, 0) for row in range(batch)])
    if len(sizes) * batch * max(map(max, sizes)) * tokens.keys[0].nbytes > _SHORT:
        return Chunks.of(sizes, tokens.keys.device)
    runs = list(pairwise(accumulate(chain.from_iterable(sizes), initial=0)))
    return Runs.of([run for row in range(batch) for run in runs[row::batch]], tokens.keys.device)


def _first_pieces(ends: Sequence[int], size: int) -> tuple[list[int], list[bool]]:
    """For each chunk of `size` tokens: the piece of its first token, and whether it has no other."""
    pieces, whole, piece = [], [], 0
    for start in range(0, ends[-1] - size + 1, size):
        while ends[piece] <= start:
            piece += 1
        pieces.append(piece)
        whole.append(ends[piece] >= start + size)
    return pieces, whole


def _rest(ends: Sequence[int], size: int) -> Iterator[tuple[int, int, int]]:
    """What lies in chunks of several pieces, or in none: piece, start and end."""
    for piece, (start, end) in enumerate(pairwise([0, *ends])):
        if start == end:
            continue
        first, last = -(-start // size) * size, end // size * size
        if first > last:
            yield piece, start, end
            continue
        if start < first:
            yield piece, start, first
        if last < end:
            yield piece, last, end
