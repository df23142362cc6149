"""One row of a prompt as plain integers: its padding, its vision blocks, its text spans."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from capsight.errors import LayoutError

Span = tuple[int, int]
"""A half-open range of token positions `[start, end)`."""

Kind = Literal["image", "video"]
"""What the tokens of a vision block show."""

Grid = tuple[int, int, int]
"""A merged token grid `(t, h, w)`."""


@dataclass(frozen=True, slots=True)
class VisionBlock:
    """A run of consecutive vision tokens that came out of one image, tile, clip or video frame.

    All positions count tokens from the start of the padded row, so they include left padding.

    Attributes:
        start: position of the first vision token.
        end: position after the last vision token.
        kind: what the tokens show.
        grid: merged `(t, h, w)`, in tokens, row-major; `(1, 1, n)` where the tokens are no grid.
        image: which image or video of the row this is, counted from 0 in order of appearance
            (images and videos in one count). The tiles of one image share it.
        delimiters: positions of the delimiter tokens that belong to this block, ascending; they
            lie outside `[start, end)`.
        frame_seconds: time from one t of a video's grid to the next, in seconds, for families whose
            positions follow it; None for others and where the processor did not say.

    Raises:
        LayoutError: a field is out of range or the grid does not hold `end - start` tokens.
    """

    start: int
    end: int
    kind: Kind
    grid: Grid
    image: int
    delimiters: tuple[int, ...] = ()
    frame_seconds: float | None = None

    def __post_init__(self) -> None:
        """Check the block against itself."""
        if not 0 <= self.start < self.end:
            raise LayoutError(f"vision block [{self.start}, {self.end}) is empty or starts before 0")
        if self.kind not in ("image", "video"):
            raise LayoutError(f"vision block kind must be 'image' or 'video', not {self.kind!r}")
        if len(self.grid) != 3 or min(self.grid) < 1:
            raise LayoutError(f"vision block grid must be three positive integers (t, h, w), not {self.grid}")
        if self.grid[0] * self.grid[1] * self.grid[2] != self.num_tokens:
            raise LayoutError(
                f"vision block [{self.start}, {self.end}) holds {self.num_tokens} tokens, "
                f"its grid {self.grid} needs {self.grid[0] * self.grid[1] * self.grid[2]}"
            )
        if self.image < 0:
            raise LayoutError(f"image index of a vision block must be >= 0, not {self.image}")
        if list(self.delimiters) != sorted(set(self.delimiters)) or any(d < 0 for d in self.delimiters):
            raise LayoutError(f"delimiters must be ascending positions >= 0, not {self.delimiters}")
        if any(self.start <= d < self.end for d in self.delimiters):
            raise LayoutError(f"delimiters {self.delimiters} lie inside the block [{self.start}, {self.end})")
        if self.frame_seconds is not None and not 0 <= self.frame_seconds < math.inf:
            raise LayoutError(f"frame_seconds must be a time of 0 or more, not {self.frame_seconds}")

    @property
    def num_tokens(self) -> int:
        """How many vision tokens the block holds."""
        return self.end - self.start

    @property
    def reach(self) -> int:
        """Position after the block and all of its delimiters."""
        return max(self.end, *(d + 1 for d in self.delimiters)) if self.delimiters else self.end


@dataclass(frozen=True, slots=True)
class RowLayout:
    """Where padding, text and vision lie in one row of a batch.

    Attributes:
        length: tokens in the padded row.
        pad_left: padding tokens at the start of the row.
        blocks: vision blocks in order of position.

    Raises:
        LayoutError: blocks overlap, leave the row, reach into the padding, share a delimiter, or
            their image indices do not count up from 0 in order of appearance.
    """

    length: int
    pad_left: int = 0
    blocks: tuple[VisionBlock, ...] = ()

    def __post_init__(self) -> None:
        """Check the blocks against the row and each other."""
        if not 0 <= self.pad_left <= self.length:
            raise LayoutError(f"pad_left {self.pad_left} is outside the row of {self.length} tokens")
        end, image = self.pad_left, -1
        for block in self.blocks:
            if block.start < end:
                raise LayoutError(f"vision block [{block.start}, {block.end}) overlaps what ends at {end}")
            if block.image not in (image, image + 1) or block.image < 0:
                raise LayoutError(
                    f"image indices must count up from 0 in order of position; {block.image} follows {image}"
                )
            end, image = block.end, block.image
        if end > self.length:
            raise LayoutError(f"vision block ends at {end}, after the row of {self.length} tokens")
        delimiters = self.delimiters
        if len(set(delimiters)) != len(delimiters):
            raise LayoutError(f"two vision blocks claim the same delimiter: {delimiters}")
        for position in delimiters:
            if not self.pad_left <= position < self.length:
                raise LayoutError(f"delimiter {position} is in the padding or outside the row")
            if self.block_at(position) is not None:
                raise LayoutError(f"delimiter {position} lies inside a vision block")

    @property
    def delimiters(self) -> tuple[int, ...]:
        """Positions of all delimiter tokens of the row, ascending."""
        return tuple(sorted(d for block in self.blocks for d in block.delimiters))

    @property
    def text_spans(self) -> tuple[Span, ...]:
        """All spans that are neither vision nor padding, delimiters included, in order."""
        return tuple(_gaps(self.pad_left, self.length, self.blocks))

    @property
    def vision_tokens(self) -> int:
        """How many vision tokens the row holds."""
        return sum(block.num_tokens for block in self.blocks)

    @property
    def text_tokens(self) -> int:
        """How many tokens are neither vision nor padding."""
        return self.length - self.pad_left - self.vision_tokens

    @property
    def num_images(self) -> int:
        """How many images the row holds; the tiles of one image count once."""
        return len({block.image for block in self.blocks if block.kind == "image"})

    @property
    def num_videos(self) -> int:
        """How many videos the row holds; the frames of one video count once."""
        return len({block.image for block in self.blocks if block.kind == "video"})

    @property
    def last_vision_end(self) -> int:
        """Position after the last vision token and the last delimiter; 0 where there is no vision."""
        return max((block.reach for block in self.blocks), default=0)

    def block_at(self, position: int) -> VisionBlock | None:
        """The vision block that holds the token at `position`, or None for text and padding."""
        return next((b for b in self.blocks if b.start <= position < b.end), None)

    def image_blocks(self, image: int) -> tuple[VisionBlock, ...]:
        """All blocks of one image or video of the row (more than one for tiles and video frames)."""
        return tuple(block for block in self.blocks if block.image == image)

    def extended(self, n: int) -> RowLayout:
        """This row with `n` more text tokens at its end.

        Raises:
            LayoutError: `n` is negative.
        """
        if n < 0:
            raise LayoutError(f"cannot extend a row by {n} tokens; use prefix() to shorten it")
        return RowLayout(self.length + n, self.pad_left, self.blocks)

    def prefix(self, n: int) -> RowLayout:
        """The first `n` tokens of this row; delimiters from `n` on are dropped.

        Raises:
            LayoutError: `n` is outside the row, or a vision block straddles it.
        """
        if not 0 <= n <= self.length:
            raise LayoutError(f"prefix({n}) of a row of {self.length} tokens")
        blocks = tuple(_cut(block, n) for block in self.blocks if block.start < n)
        return RowLayout(n, min(self.pad_left, n), blocks)


def _gaps(start: int, end: int, blocks: tuple[VisionBlock, ...]) -> Iterator[Span]:
    for block in blocks:
        if start < block.start:
            yield start, block.start
        start = block.end
    if start < end:
        yield start, end


def _cut(block: VisionBlock, n: int) -> VisionBlock:
    if block.end > n:
        raise LayoutError(
            f"position {n} cuts the vision block [{block.start}, {block.end}); "
            f"split before {block.start} or from {block.end} on"
        )
    return replace(block, delimiters=tuple(d for d in block.delimiters if d < n))
