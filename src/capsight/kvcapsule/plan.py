"""`CapsulePlan`: which tokens of a prompt become capsules, as plain integers; all others stay exact."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from capsight.errors import OptionError
from capsight.layout import PromptLayout

DEFAULT_BLOCK_SIZE = 64


class Run(NamedTuple):
    """Consecutive vision tokens of one vision block that become capsules together.

    `block_size` of them, the content of one capsule per layer; or, where a block is a single token, all of
    the vision block.
    """

    row: int
    start: int
    length: int = 1

    @property
    def end(self) -> int:
        """Position after the last token."""
        return self.start + self.length


@dataclass(frozen=True, slots=True)
class CapsulePlan:
    """The capsule runs of a batch of prompts: a pure function of its layout (our design).

    A vision block of n tokens holds `n // block_size` runs, counted from its first token; with blocks of one
    token it is one run. The tail of a block, text, delimiters and generated tokens are exact.

    Attributes:
        block_size: tokens in a run (N).
        pads: left padding of each row, in tokens.
        runs: all runs, ascending by row, then start.

    Raises:
        OptionError: `block_size` is less than 1.
    """

    block_size: int
    pads: tuple[int, ...]
    runs: tuple[Run, ...]

    def __post_init__(self) -> None:
        """Check the block size."""
        if self.block_size < 1:
            raise OptionError(f"block_size must be at least 1 token, not {self.block_size}")

    @classmethod
    def from_layout(cls, layout: PromptLayout, block_size: int = DEFAULT_BLOCK_SIZE) -> CapsulePlan:
        """The plan of a layout.

        Raises:
            OptionError: `block_size` is less than 1.
        """
        runs = tuple(
            Run(index, start, length)
            for index, row in enumerate(layout.rows)
            for block in row.blocks
            for length in (block_size if block_size > 1 else max(block.end - block.start, 1),)
            for start in range(block.start, block.end - length + 1, length)
        )
        return cls(block_size, tuple(row.pad_left for row in layout.rows), runs)

    @property
    def batch_size(self) -> int:
        """Number of rows (B)."""
        return len(self.pads)

    @property
    def capsule_tokens(self) -> int:
        """Tokens of all rows that become capsules."""
        return sum(run.length for run in self.runs)

    def complete(self, seen: int) -> tuple[Run, ...]:
        """The runs that lie wholly inside the first `seen` tokens of their row."""
        return tuple(run for run in self.runs if run.end <= seen)

    def real_tokens(self, seen: int) -> int:
        """How many of the first `seen` tokens of all rows are not left padding."""
        return sum(max(seen - pad, 0) for pad in self.pads)


def exact_spans(runs: Iterable[Run], pads: Sequence[int], seen: int) -> list[list[tuple[int, int]]]:
    """Per row, the spans `[start, end)` of the first `seen` tokens that are neither padding nor in a run."""
    spans: list[list[tuple[int, int]]] = [[] for _ in pads]
    reached = list(pads)
    for run in runs:
        if reached[run.row] < run.start:
            spans[run.row].append((reached[run.row], run.start))
        reached[run.row] = run.end
    for row, end in enumerate(reached):
        if end < seen:
            spans[row].append((end, seen))
    return spans
