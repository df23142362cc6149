"""What attention over capsules reads: stored tokens, how others follow from them, which row they are of."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary


@dataclass(frozen=True, slots=True, eq=False)
class TokenMap:
    """How the N tokens of a block follow from its r slots; keys and values have one each.

    The tokens are the slots themselves, if `copied`, then `weights @ slots + rest * mean`. Their order
    is free, since attention does not depend on it, but is the same for keys and values.

    Attributes:
        copied: whether the slots are tokens.
        weights: float `[M or 1, T, r]`, of the T tokens that are rebuilt; None if there are none, and
            the slots are the tokens.
        rest: float `[M or 1, T]`, weights of `mean`; None if there is no mean.
        mean: float `[H, D]`.
    """

    copied: bool = True
    weights: Tensor | None = None
    rest: Tensor | None = None
    mean: Tensor | None = None

    @property
    def slot_tokens(self) -> bool:
        """Whether the slots are tokens."""
        return self.copied or self.weights is None

    def part(self, start: int, stop: int) -> TokenMap:
        """That of blocks `start` to `stop`."""
        weights, rest = (x if x is None or len(x) == 1 else x[start:stop] for x in (self.weights, self.rest))
        return TokenMap(self.copied, weights, rest, self.mean)


@dataclass(frozen=True, slots=True, eq=False)
class LatentBlocks:
    """Capsules of M blocks as attention reads them.

    Attributes:
        keys: `[M, r, H, D]`, slots.
        values: `[M, r, H, D]`, slots.
        key_map: from key slots to keys.
        value_map: from value slots to values; copies them as `key_map` does, or does not copy.
    """

    keys: Tensor
    values: Tensor
    key_map: TokenMap
    value_map: TokenMap

    def part(self, start: int, stop: int) -> LatentBlocks:
        """Blocks `start` to `stop`, as views."""
        return LatentBlocks(
            self.keys[start:stop],
            self.values[start:stop],
            self.key_map.part(start, stop),
            self.value_map.part(start, stop),
        )


@dataclass(frozen=True, eq=False)
class BlockRows:
    """Which rows of the batch the M blocks belong to.

    Attributes:
        rows: int64 `[M]`, row of each block, ascending.
        ranks: int64 `[M]`, its number among the blocks of its row.
        most: the largest number of blocks of a row.
    """

    rows: Tensor
    ranks: Tensor
    most: int

    @cached_property
    def spans(self) -> dict[int, tuple[int, int]]:
        """First and last + 1 of the blocks of each row that has some."""
        stops = torch.bincount(self.rows).cumsum(0).tolist()
        spans = zip([0, *stops], stops, strict=False)
        return {row: (start, stop) for row, (start, stop) in enumerate(spans) if start < stop}

    def sums(self, counts: Tensor, batch: int) -> Tensor:
        """Of int `[M, H]`, one for each block, those of the rows: int64 `[B, H]`."""
        none = torch.zeros(batch, counts.shape[1], dtype=torch.int64, device=counts.device)
        return none.index_add_(0, self.rows, counts.long())

    @cached_property
    def plans(self) -> WeakTensorKeyDictionary:
        """What was computed for these rows, by the counts of `KeptTokens`, as long as those are there."""
        return WeakTensorKeyDictionary()


@dataclass(frozen=True, slots=True, eq=False)
class KeptTokens:
    """The tokens that remain of M blocks; each KV head has its own, and nothing stands for the others.

    Attributes:
        keys: `[E, D]`: head 0 of all blocks in their order, then head 1 of all blocks, ...
        values: `[E, D]`.
        counts: int `[M, H]`, tokens of each head of each block.
    """

    keys: Tensor
    values: Tensor
    counts: Tensor

    def sizes(self, rows: BlockRows) -> list[list[int]]:
        """Tokens of each head of each row that has some, as they lie in memory: `[H][rows]`."""
        return [
            [sum(counts[first:last]) for first, last in rows.spans.values()]
            for counts in self.counts.T.tolist()
        ]
