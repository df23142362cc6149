"""`CapsulePlan`: which tokens of a prompt become capsules, as plain integers; all others stay exact."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from capsight.errors import OptionError
from capsight.layout import PromptLayout

DEFAULT_BLOCK_SIZE = 64


class Run(NamedTuple):
    """`block_size` consecutive vision tokens of one vision block: the content of one capsule per layer."""

    row: int
    start: int


@dataclass(frozen=True, slots=True)
class CapsulePlan:
    """The capsule runs of a batch of prompts: a pure function of its layout (our design).

    A vision block of n tokens holds `n // block_size` runs, counted from its first token. The
    tail of a block, text, delimiters and generated tokens are exact.

    Attributes:
        block_size: tokens in a run (N).
        pads: left padding of each row, in tokens.
        runs: all runs, ascending by row, then start.

    Raises:
        OptionError: `block_size` is less than 2.
    """

    block_size: int
    pads: tuple[int, ...]
    runs: tuple[Run, ...]

    def __post_init__(self) -> None:
        """Check the block size."""
        if self.block_size < 2:
            raise OptionError(f"block_size must be at least 2 tokens, not {self.block_size}")

    @classmethod
    def from_layout(cls, layout: PromptLayout, block_size: int = DEFAULT_BLOCK_SIZE) -> CapsulePlan:
        """The plan of a layout.

        Raises:
            OptionError: `block_size` is less than 2.
        """
        step = max(block_size, 1)
        runs = tuple(
            Run(index, start)
            for index, row in enumerate(layout.rows)
            for block in row.blocks
            for start in range(block.start, block.end - step + 1, step)
        )
        return cls(block_size, tuple(row.pad_left for row in layout.rows), runs)

    @property
    def batch_size(self) -> int:
        """Number of rows (B)."""
        return len(self.pads)

    @property
    def capsule_tokens(self) -> int:
        """Tokens of all rows that become capsules."""
        return len(self.runs) * self.block_size

    def complete(self, seen: int) -> tuple[Run, ...]:
        """The runs that lie wholly inside the first `seen` tokens of their row."""
        return tuple(run for run in self.runs if run.start + self.block_size <= seen)

    def real_tokens(self, seen: int) -> int:
        """How many of the first `seen` tokens of all rows are not left padding."""
        return sum(max(seen - pad, 0) for pad in self.pads)


def exact_spans(
    runs: Iterable[Run], pads: Sequence[int], block_size: int, seen: int
) -> list[list[tuple[int, int]]]:
    """Per row, the spans `[start, end)` of the first `seen` tokens that are neither padding nor in a run."""
    spans: list[list[tuple[int, int]]] = [[] for _ in pads]
    reached = list(pads)
    for row, start in runs:
        if reached[row] < start:
            spans[row].append((reached[row], start))
        reached[row] = start + block_size
    for row, end in enumerate(reached):
        if end < seen:
            spans[row].append((end, seen))
    return spans
