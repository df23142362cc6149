"""`PromptLayout`: where the images lie in a batch of prompts, and nothing else, as plain integers.

Everything capsight does (masks, capsule plans, byte counts, plots) is a function of this value.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

from capsight.errors import LayoutError
from capsight.layout.row_layout import Grid, Kind, RowLayout, Span, VisionBlock

__all__ = ["Grid", "Kind", "PromptLayout", "RowLayout", "Span", "VisionBlock"]


@dataclass(frozen=True, slots=True)
class PromptLayout:
    """The layout of a batch of prompts; immutable, hashable, and free of tensors.

    Build it from processor outputs with `capsight.layout.build_layout`.

    Attributes:
        rows: one `RowLayout` per row of the batch, all of the same length.

    Raises:
        LayoutError: there are no rows, or their lengths differ.
    """

    rows: tuple[RowLayout, ...]

    def __post_init__(self) -> None:
        """Check that the rows form one batch."""
        if not self.rows:
            raise LayoutError("a prompt layout needs at least one row")
        lengths = {row.length for row in self.rows}
        if len(lengths) > 1:
            raise LayoutError(f"all rows of a batch have the same padded length, not {sorted(lengths)}")

    @property
    def batch_size(self) -> int:
        """Number of rows (B)."""
        return len(self.rows)

    @property
    def length(self) -> int:
        """Tokens per padded row (S)."""
        return self.rows[0].length

    @property
    def vision_tokens(self) -> int:
        """Vision tokens in all rows together."""
        return sum(row.vision_tokens for row in self.rows)

    @property
    def num_images(self) -> int:
        """Images in all rows together; videos are counted by `num_videos`."""
        return sum(row.num_images for row in self.rows)

    @property
    def num_videos(self) -> int:
        """Videos in all rows together."""
        return sum(row.num_videos for row in self.rows)

    @property
    def last_vision_end(self) -> int:
        """The smallest n such that all vision blocks and their delimiters lie before n.

        `prefix(layout.last_vision_end)` is the part of the prompt that holds the images; what
        follows (the question) is text in every row. 0 where no row has an image.
        """
        return max(row.last_vision_end for row in self.rows)

    def extended(self, n: int) -> PromptLayout:
        """This layout with `n` more text tokens at the end of every row.

        Raises:
            LayoutError: `n` is negative.
        """
        return self._map(lambda row: row.extended(n))

    def prefix(self, n: int) -> PromptLayout:
        """The first `n` tokens of every row; delimiters from `n` on are dropped.

        A row whose padding reaches `n` becomes padding only (`pad_left == n`).

        Raises:
            LayoutError: `n` is outside the rows, or a vision block of some row straddles it.
        """
        return self._map(lambda row: row.prefix(n))

    def continued(self, seen: int, length: int) -> PromptLayout:
        """The first `seen` tokens of this layout, then text up to `length` tokens a row.

        Raises:
            LayoutError: `length` is less than `seen`, or a vision block straddles `seen`.
        """
        return self.prefix(min(seen, self.length)).extended(length - min(seen, self.length))

    def select(self, rows: Sequence[int]) -> PromptLayout:
        """The named rows, in that order, repeats allowed (as `tensor[rows]`; beam reordering).

        Raises:
            LayoutError: no row is named, or a row does not exist.
        """
        wrong = [row for row in rows if not 0 <= row < self.batch_size]
        if wrong:
            raise LayoutError(f"rows {wrong} do not exist in a batch of {self.batch_size}")
        return PromptLayout(tuple(self.rows[row] for row in rows))

    def repeat(self, n: int) -> PromptLayout:
        """Every row `n` times in place (as `torch.repeat_interleave`; beams, several sequences).

        Raises:
            LayoutError: `n` is less than 1.
        """
        if n < 1:
            raise LayoutError(f"repeat({n}): each row is repeated at least once")
        return PromptLayout(tuple(row for row in self.rows for _ in range(n)))

    def to_dict(self) -> dict[str, Any]:
        """This layout as JSON-ready lists and dicts; `from_dict` reads it back."""
        return {"rows": [asdict(row) for row in self.rows]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> PromptLayout:
        """The layout that `to_dict` wrote, also after a trip through JSON.

        Raises:
            LayoutError: a field is missing or of the wrong type, or the layout is not valid.
        """
        try:
            return cls(tuple(_row_from_dict(row) for row in data["rows"]))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            if isinstance(error, LayoutError):
                raise
            raise LayoutError(f"not a prompt layout as to_dict() writes it: {error!r}") from error

    def summary(self) -> str:
        """A few lines for people: one line for the batch, one per row."""
        lines = [f"PromptLayout: {self.batch_size} rows x {self.length} tokens, {self.vision_tokens} vision"]
        for index, row in enumerate(self.rows):
            blocks = " ".join(_block_summary(block) for block in row.blocks) or "no vision"
            lines.append(f"  row {index}: pad {row.pad_left}, text {row.text_tokens}, {blocks}")
        return "\n".join(lines)

    def _map(self, change: Callable[[RowLayout], RowLayout]) -> PromptLayout:
        return PromptLayout(tuple(change(row) for row in self.rows))


def _block_summary(block: VisionBlock) -> str:
    t, h, w = block.grid
    return f"{block.kind}{block.image}[{block.start}:{block.end}] {t}x{h}x{w}"


def _row_from_dict(data: Mapping[str, Any]) -> RowLayout:
    blocks = tuple(_block_from_dict(block) for block in data["blocks"])
    return RowLayout(_integer(data["length"]), _integer(data["pad_left"]), blocks)


def _block_from_dict(data: Mapping[str, Any]) -> VisionBlock:
    grid = tuple(_integer(size) for size in data["grid"])
    return VisionBlock(
        start=_integer(data["start"]),
        end=_integer(data["end"]),
        kind=data["kind"],
        grid=cast("Grid", grid),
        image=_integer(data["image"]),
        delimiters=tuple(_integer(position) for position in data["delimiters"]),
        frame_seconds=None if (seconds := data.get("frame_seconds")) is None else float(seconds),
    )


def _integer(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"expected an integer, found {value!r}")
    return value
