"""`Placement`: where the stored parts of a layer go in the full-length sequence, as index tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from capsight.errors import CapsightError
from capsight.kvcapsule.plan import Run, exact_spans


@dataclass(frozen=True, slots=True, eq=False)
class Placement:
    """The runs and exact tokens among the first `settled` tokens; shared by all layers of a cache.

    Attributes:
        block_size: tokens in a run (N).
        settled: tokens per row that are stored as capsules or packed exact tokens.
        pads: left padding of each row, in tokens.
        runs: the runs stored as capsules, ascending.
        run_rows: int64 `[M]`, row of each run.
        run_starts: int64 `[M]`, first position of each run.
        exact_rows: int64 `[E]`, row of each exact token.
        exact_cols: int64 `[E]`, position of each exact token, ascending within a row.
    """

    block_size: int
    settled: int
    pads: tuple[int, ...]
    runs: tuple[Run, ...]
    run_rows: Tensor
    run_starts: Tensor
    exact_rows: Tensor
    exact_cols: Tensor

    @classmethod
    def build(
        cls, runs: tuple[Run, ...], pads: tuple[int, ...], block_size: int, settled: int, device: torch.device
    ) -> Placement:
        """Place `runs` (ascending) in rows of `settled` tokens."""
        spans = exact_spans(runs, pads, settled)
        rows = [torch.full((end - start,), row) for row, part in enumerate(spans) for start, end in part]
        cols = [torch.arange(start, end) for part in spans for start, end in part]
        none = torch.empty(0, dtype=torch.int64)
        return cls(
            block_size,
            settled,
            pads,
            runs,
            torch.tensor([run.row for run in runs], dtype=torch.int64, device=device),
            torch.tensor([run.start for run in runs], dtype=torch.int64, device=device),
            torch.cat([none, *rows]).to(device),
            torch.cat([none, *cols]).to(device),
        )

    @property
    def nbytes(self) -> int:
        """Bytes of the index tensors."""
        return sum(t.nbytes for t in (self.run_rows, self.run_starts, self.exact_rows, self.exact_cols))

    @property
    def run_lengths(self) -> Tensor:
        """Tokens of each run: int64 `[M]`."""
        if self.block_size > 1:
            return torch.full_like(self.run_rows, self.block_size)
        return torch.tensor([run.length for run in self.runs], dtype=torch.int64, device=self.run_rows.device)

    def run_slots(self, length: int) -> Tensor:
        """Flat positions of the runs' T tokens in rows of `length` tokens: int64 `[T]`."""
        first = self.run_rows * length + self.run_starts  # [M]
        before = self.run_lengths.cumsum(0) - self.run_lengths
        offsets = torch.repeat_interleave(first - before, self.run_lengths)
        return offsets + torch.arange(len(offsets), device=offsets.device)

    def spread(self, bias: Tensor, length: int) -> Tensor:
        """Numbers of the runs' tokens, `[M, H, N]`, in rows of `length` tokens: `[B, H, length]`."""
        flat = bias.new_zeros(len(self.pads) * length, bias.shape[1])
        flat[self.run_slots(length)] = bias.transpose(1, 2).flatten(0, 1)
        return flat.view(-1, length, bias.shape[1]).transpose(1, 2)

    def exact_slots(self, length: int) -> Tensor:
        """Flat positions of the exact tokens in rows of `length` tokens: int64 `[E]`."""
        return self.exact_rows * length + self.exact_cols

    def check_crop(self, remaining: int) -> None:
        """Refuse to keep the first `remaining` tokens only if that would cut a capsule.

        Raises:
            CapsightError: it would.
        """
        end = max((run.end for run in self.runs), default=0)
        if end > remaining:
            raise CapsightError(
                f"cannot crop to {remaining} tokens: the last image capsule ends at {end}; crop to no less "
                "than that, or reset the cache and prefill again"
            )

    def select(self, rows: Sequence[int]) -> tuple[Placement, Tensor, Tensor]:
        """The placement of a batch made of `rows` of this one (repeats allowed).

        Returns:
            The new placement, and int64 indices into the old capsules and old exact tokens `[E']`.
        """
        runs_of: list[list[int]] = [[] for _ in self.pads]
        for index, run in enumerate(self.runs):
            runs_of[run.row].append(index)
        run_index = [index for row in rows for index in runs_of[row]]
        runs = tuple(
            self.runs[index]._replace(row=new) for new, row in enumerate(rows) for index in runs_of[row]
        )
        if self.block_size == 1:
            ends = self.run_lengths.cumsum(0).tolist()
            run_index = [
                t for index in run_index for t in range(ends[index] - self.runs[index].length, ends[index])
            ]
        device = self.run_rows.device
        placement = Placement.build(
            runs, tuple(self.pads[row] for row in rows), self.block_size, self.settled, device
        )
        by_row = [(self.exact_rows == row).nonzero().flatten() for row in range(len(self.pads))]
        return (
            placement,
            torch.tensor(run_index, dtype=torch.int64, device=device),
            torch.cat([by_row[r] for r in rows]),
        )
