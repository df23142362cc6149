"""`ExactRows`: the exact tokens of a batch side by side, as attention over capsules reads them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor

from capsight.kvcapsule.attention import BlockRows
from capsight.kvcapsule.cache.buffers import Scratch
from capsight.kvcapsule.cache.placement import Placement


@dataclass(slots=True, eq=False)
class ExactRows:
    """Where exact tokens lie in rows of X tokens: packed ones at the end of the first `width`, then the tail.

    Derived from a placement and, as the scratch buffer, only there while tokens are decoded.

    Attributes:
        settled: tokens per row that the placement covers.
        width: the most packed tokens of a row.
        slots: int64 `[E]`, place of each packed token in its row.
        rows: int64 `[E]`, its row.
        columns: int64 `[B, width]`, logical position of what lies in each place; 0 where nothing does.
        filled: bool `[B, width]`, whether anything does; None if it does everywhere.
        blocks: which rows the capsules belong to.
    """

    settled: int
    width: int
    slots: Tensor
    rows: Tensor
    columns: Tensor
    filled: Tensor | None
    blocks: BlockRows
    _bias: tuple[Tensor | None, tuple[int, int, int], Tensor | None] | None = None
    _pieces: tuple[Tensor, Tensor] | None = None

    @classmethod
    def build(cls, placement: Placement) -> ExactRows:
        """Line up the exact tokens of `placement`."""
        runs = Counter(run.row for run in placement.runs)
        exact = [max(placement.settled - pad, 0) for pad in placement.pads]
        for run in placement.runs:
            exact[run.row] -= run.length
        width, rows = max(exact), placement.exact_rows
        first = torch.tensor([width - count for count in exact], device=rows.device)
        slots = _ranks(rows) + first[rows]
        columns = torch.zeros(len(exact), width, dtype=torch.int64, device=rows.device)
        columns[rows, slots] = placement.exact_cols
        filled = torch.arange(width, device=rows.device) >= first[:, None]
        blocks = BlockRows(placement.run_rows, _ranks(placement.run_rows), max(runs.values(), default=0))
        ragged = min(exact) < width
        return cls(placement.settled, width, slots, rows, columns, filled if ragged else None, blocks)

    def lined_up(self, packed: Tensor, tail: Tensor, scratch: Scratch, role: str) -> Tensor:
        """The exact tokens: `[B, X, H, D]` from `[E, H, D]` and `[B, T, H, D]`, else zeros.

        Several rows lie in `scratch`, valid until the next layer needs that role.
        """
        if len(tail) == 1:
            return torch.cat((packed[None], tail), 1)
        out = scratch.view(role, (len(tail), self.width + tail.shape[1], *tail.shape[2:]), tail)
        out[:, : self.width] = 0
        out.flatten(0, 1).index_copy_(0, self.rows * out.shape[1] + self.slots, packed)
        out[:, self.width :] = tail
        return out

    def bias(self, mask: Tensor | None, queries: int, exact: int, query_heads: int) -> Tensor | None:
        """What `mask` means as a bias: float32 `[B or 1, 1 or Hq, Q, X]`, contiguous; see there.

        The last one is remembered: the layers of a model ask for the same. Places where no packed token lies
        need no hiding, since attention by pieces does not look there.
        """
        if mask is None and queries == 1:
            return None
        version = 0 if mask is None or mask.is_inference() else mask._version
        asked = version, queries, exact
        if self._bias is None or self._bias[0] is not mask or self._bias[1] != asked:
            bias = self.mask(mask, queries, exact)
            if bias is not None and bias.dtype == torch.bool:
                bias = torch.zeros(bias.shape).masked_fill(~bias, -torch.inf)
            if bias is not None and queries == 1 and not self._hides(bias):
                bias = None  # the usual step: what is padding lies nowhere
            if bias is not None and bias.shape[1] == 1 and queries > 1:
                bias = bias.expand(-1, query_heads, -1, -1)
            self._bias = mask, asked, None if bias is None else bias.float().contiguous()
        return self._bias[2]

    def _hides(self, bias: Tensor) -> bool:
        """Whether a bias `[B or 1, .., X]` changes anything of tokens that are there."""
        if self.filled is None:
            return bool(bias.any())
        there = torch.nn.functional.pad(self.filled, (0, bias.shape[3] - self.width), value=True)
        return bool(bias.masked_fill(~there[:, None, None], 0).any())

    def pieces(self, heads: int) -> tuple[Tensor, Tensor]:
        """First packed token of each row, and how many it has: int64 `[B, H]` each, contiguous."""
        if self._pieces is None:
            counts = torch.bincount(self.rows, minlength=len(self.columns))
            starts, counts = torch.stack((counts.cumsum(0) - counts, counts))[..., None].expand(-1, -1, heads)
            self._pieces = starts.contiguous(), counts.contiguous()
        return self._pieces

    def mask(self, mask: Tensor | None, queries: int, exact: int) -> Tensor | None:
        """The mask over exact tokens that one over all tokens means.

        Args:
            mask: bool or additive `[B or 1, 1 or Hq, Q, S]`, S logical positions; None means causal.
            queries: new tokens (Q), the last ones.
            exact: exact tokens of a row (X).

        Returns:
            Of the same kind, `[B or 1, 1 or Hq, Q, X]`; None if every query sees every token.
        """
        if mask is None:
            seen = None
            if queries > 1:
                seen = torch.ones(queries, exact, dtype=torch.bool, device=self.columns.device)
                seen = seen.tril(exact - queries)[None, None]
            if self.filled is None:
                return seen
            filled = torch.nn.functional.pad(self.filled, (0, exact - self.width), value=True)[:, None, None]
            return filled if seen is None else filled & seen
        mask = mask.expand(len(self.columns), -1, -1, -1)
        packed = mask.take_along_dim(self.columns[:, None, None], 3)  # [B, 1 or Hq, Q, width]
        if self.filled is not None:
            nothing = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
            packed = packed.masked_fill(~self.filled[:, None, None], nothing)
        return torch.cat([packed, mask[..., self.settled :]], 3)


def _ranks(rows: Tensor) -> Tensor:
    """How many entries before each one of ascending `rows` are of the same row."""
    return torch.arange(len(rows), device=rows.device) - torch.searchsorted(rows, rows)
