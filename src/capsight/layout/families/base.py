"""What a model family's adapter is, and the few things that all adapters need."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from capsight.errors import LayoutError
from capsight.layout.row_layout import Grid, RowLayout, Span, VisionBlock


@dataclass(frozen=True, slots=True)
class TokenRow:
    """One row of `input_ids` as the adapters see it.

    Attributes:
        index: row number in the batch, for error messages.
        ids: token ids, padding included.
        pad_left: how many of them are padding.
    """

    index: int
    ids: tuple[int, ...]
    pad_left: int

    def runs(self, *token_ids: int) -> list[Span]:
        """Maximal spans after the padding whose tokens all equal one of `token_ids`, in order.

        A change from one of the ids to another ends a span.
        """
        spans: list[Span] = []
        start = self.pad_left
        for token, alike in groupby(self.ids[start:]):
            end = start + len(list(alike))
            if token in token_ids:
                spans.append((start, end))
            start = end
        return spans

    def at(self, position: int) -> int | None:
        """The token id at `position`, or None in the padding and outside the row."""
        return self.ids[position] if self.pad_left <= position < len(self.ids) else None

    def error(self, message: str) -> LayoutError:
        """A LayoutError that names this row."""
        return LayoutError(f"row {self.index}: {message}")


class Family(Protocol):
    """Reads the vision blocks of one model family out of token ids."""

    @property
    def model_types(self) -> tuple[str, ...]:
        """Values of `config.model_type` that this family answers to."""
        ...

    def refusal(self, config: Any) -> str | None:
        """Why a model with this config cannot be run, as the start of a sentence; None if it can."""
        ...

    def blocks(
        self, rows: Sequence[TokenRow], inputs: Mapping[str, Any], config: Any
    ) -> list[list[VisionBlock]]:
        """The vision blocks of every row, in order of position.

        Args:
            rows: the batch.
            inputs: what the processor returned; grids and image sizes are flat over the batch,
                in row order.
            config: the model's config.

        Raises:
            LayoutError: the tokens do not have the structure that the family's processor writes.
        """
        ...

    @property
    def position_rows(self) -> int:
        """How many numbers a token's position has: 1, or 3 (M-RoPE)."""
        ...

    def row_positions(self, row: RowLayout, config: Any) -> NDArray[np.int64]:
        """The rotary positions of one row, `[3, S]`, see `capsight.layout.positions.rope_positions`."""
        ...


class Supply:
    """Hands out per-image entries (grids, sizes) in the order in which the prompts use them."""

    def __init__(self, inputs: Mapping[str, Any], key: str) -> None:
        """Read `inputs[key]`, a tensor, array or list with one row per image; absent means none."""
        self.key = key
        self.entries = integer_rows(inputs[key]) if inputs.get(key) is not None else []
        self.used = 0

    def take(self, row: TokenRow, position: int) -> tuple[int, ...]:
        """The next entry, for the vision tokens of `row` that start at `position`.

        Raises:
            LayoutError: all entries are used up.
        """
        if self.used == len(self.entries):
            raise row.error(
                f"vision tokens at {position} have no entry left in {self.key} ({len(self.entries)} in all); "
                "pass the processor's outputs for the whole batch"
            )
        self.used += 1
        return self.entries[self.used - 1]

    def finish(self) -> None:
        """Check that the prompts used every entry.

        Raises:
            LayoutError: entries are left over.
        """
        if self.used < len(self.entries):
            raise LayoutError(
                f"{self.key} has {len(self.entries)} entries, but the prompts hold vision tokens for "
                f"{self.used}; the prompt was truncated or a placeholder is missing"
            )


def integer_rows(value: Any) -> list[tuple[int, ...]]:
    """A 2-D tensor, array or nested list as tuples of plain integers."""
    listed = value.tolist() if hasattr(value, "tolist") else value
    return [tuple(int(entry) for entry in _as_list(row)) for row in listed]


def _as_list(row: Any) -> Any:
    return row.tolist() if hasattr(row, "tolist") else row


def check_length(row: TokenRow, span: Span, expected: int, what: str) -> None:
    """Check that a run of vision tokens has the length that its image calls for.

    Raises:
        LayoutError: it has not; the message says which of the usual reasons is likely.
    """
    length = span[1] - span[0]
    if length == expected:
        return
    if length < expected and (span[0] == row.pad_left or span[1] == len(row.ids)):
        reason = "the prompt was truncated inside an image; raise max_length or turn truncation off"
    elif expected and length % expected == 0:
        reason = "neighbouring images stand there without the delimiters that the family writes between them"
    else:
        reason = "the images and the prompt do not belong together"
    raise row.error(f"{length} vision tokens at {span[0]}, but {what} calls for {expected}: {reason}")


def enclosing(row: TokenRow, span: Span, opener: int, closer: int) -> tuple[int, int]:
    """Positions of the delimiter tokens directly before and after a run of vision tokens.

    Raises:
        LayoutError: one of the two is not there.
    """
    if row.at(span[0] - 1) != opener:
        raise row.error(
            f"vision tokens at {span[0]} are not preceded by the start-of-image token {opener}; "
            "build the prompt with the model's own chat template and processor"
        )
    if span[1] >= len(row.ids):
        raise row.error(
            f"the prompt ends with the vision tokens at {span[0]}, without the end-of-image token {closer}; "
            "it was truncated: raise max_length or turn truncation off"
        )
    if row.at(span[1]) != closer:
        raise row.error(
            f"vision tokens at {span[0]} are not followed by the end-of-image token {closer}; "
            "build the prompt with the model's own chat template and processor"
        )
    return span[0] - 1, span[1]


def check_pictures(inputs: Mapping[str, Any], count: int) -> None:
    """Check that `pixel_values`, where given, holds one picture for each block found.

    Raises:
        LayoutError: it does not.
    """
    pixels = inputs.get("pixel_values")
    if pixels is not None and len(pixels) != count:
        raise LayoutError(
            f"pixel_values holds {len(pixels)} pictures, but the prompts hold vision tokens for {count}; "
            "the prompt was truncated or a placeholder is missing"
        )


def square(tokens: int) -> Grid:
    """The grid of a square picture of `tokens` tokens; a line where that is no square."""
    side = math.isqrt(tokens)
    return (1, side, side) if side * side == tokens else (1, 1, tokens)
