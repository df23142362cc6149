"""`Seen`: one layer's queries and keys, and the attention weights of the last of them, in chunks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK = 128  # queries whose weights are held at a time


@dataclass(frozen=True, slots=True, eq=False)
class Seen:
    """The attention of one layer in one forward pass.

    Attributes:
        query: `[B, Hq, Q, D]`, the last Q of S tokens.
        key: `[B, H, S, D]`.
        mask: bool or additive `[B, 1 or Hq, Q, S]`; None means causal.
        scaling: factor on the scores.
        pads: left padding of each row, in tokens.
    """

    query: Tensor
    key: Tensor
    mask: Tensor | None
    scaling: float
    pads: Sequence[int]

    def weights(self, first: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Attention weights of the tokens from position `first` on, some queries at a time.

        Yields:
            int64 `[q]`, positions of the queries, and float32 `[B, H, G, q, S]`, their weights (G query
            heads share a KV head).
        """
        heads, length, queries = self.key.shape[1], self.key.shape[2], self.query.shape[2]
        keys = self.key.float()[:, :, None].mT  # [B, H, 1, D, S]
        offset = length - queries
        columns = torch.arange(length, device=keys.device)
        for start in range(max(first - offset, 0), queries, CHUNK):
            end = min(start + CHUNK, queries)
            positions = columns[offset + start : offset + end]
            scores = self.query[:, :, start:end].unflatten(1, (heads, -1)).float() @ keys * self.scaling
            scores = _masked(scores, self.mask, start, end, columns <= positions[:, None])
            yield positions, scores.softmax(-1)

    def real(self, positions: Tensor) -> Tensor:
        """Whether tokens at `positions` `[q]` are no padding: bool `[B, q]`."""
        return positions >= torch.tensor(self.pads, device=positions.device)[:, None]

    def mean(self, firsts: Sequence[int]) -> Tensor:
        """Mean weight that each key gets from the queries that may see it, over the query heads of a group.

        Args:
            firsts: for each row, the position from which on its queries count.

        Returns:
            float32 `[B, H, S]`.
        """
        batch, heads, length, _ = self.key.shape
        total = self.key.new_zeros(batch, heads, length, dtype=torch.float32)
        seers = self.key.new_zeros(batch, 1, length, dtype=torch.float32)
        columns = torch.arange(length, device=total.device)
        for positions, weights in self.weights(min(firsts)):
            counts = self.real(positions) & self._from(positions, firsts)  # [B, q]
            total += (weights.mean(2) * counts[:, None, :, None]).sum(2)
            seers += (counts[:, :, None] & (columns <= positions[:, None])).sum(1)[:, None]
        return total / seers.clamp_min(1)

    @staticmethod
    def _from(positions: Tensor, firsts: Sequence[int]) -> Tensor:
        return positions >= torch.tensor(firsts, device=positions.device)[:, None]


def _masked(scores: Tensor, mask: Tensor | None, start: int, end: int, causal: Tensor) -> Tensor:
    """Scores `[B, H, G, q, S]` under the mask's rows `start:end`, or the causal rule `[q, S]`."""
    lowest = torch.finfo(scores.dtype).min
    if mask is None:
        return scores.masked_fill(~causal, lowest)
    part = mask[:, :, start:end, : scores.shape[-1]]
    part = part[:, :, None] if part.shape[1] == 1 else part.unflatten(1, scores.shape[1:3])
    if part.dtype == torch.bool:
        return scores.masked_fill(~part, lowest)
    return (scores + part).clamp_min(lowest)
