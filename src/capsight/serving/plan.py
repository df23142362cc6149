"""`plan_request`: which blocks of paged memory a request's images shrink into; plain integers only.

vLLM's scheduler (which frees blocks) and its workers (which fill and read them) both ask this function, in
processes of their own, so it may depend on nothing but its arguments.

All blocks from the first image's first token to the last image's last one are a *region*. When the prompt has
been read, every KV head writes what it keeps of the region to the region's last blocks: all text in between,
and as many image tokens as fit. The blocks in front of them are freed as they are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from capsight.errors import OptionError


@dataclass(frozen=True, slots=True)
class RequestPlan:
    """How the region of one prompt shrinks, in every layer and head alike.

    Attributes:
        block_size: tokens in a block.
        first: index of the region's first block in the request's block table.
        blocks: blocks of the region.
        kept_blocks: blocks of it that stay, the last ones; all slots in them are filled.
        images: `[start, end)` of each image in the region, counted from the region's first token.
    """

    block_size: int
    first: int
    blocks: int
    kept_blocks: int
    images: tuple[tuple[int, int], ...]

    @property
    def tokens(self) -> int:
        """Tokens of the region."""
        return self.blocks * self.block_size

    @property
    def image_tokens(self) -> int:
        """Image tokens of the region."""
        return sum(self.sizes)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Tokens of each image in the region."""
        return tuple(end - start for start, end in self.images)

    @property
    def kept_image_tokens(self) -> int:
        """Image tokens that every head keeps."""
        return self.kept_blocks * self.block_size - (self.tokens - self.image_tokens)

    @property
    def freed(self) -> range:
        """Indices of the blocks that are freed."""
        return range(self.first, self.first + self.blocks - self.kept_blocks)

    @property
    def written(self) -> range:
        """Indices of the blocks that stay and are written."""
        return range(self.freed.stop, self.first + self.blocks)

    @property
    def freed_tokens(self) -> int:
        """By how many tokens the request becomes shorter."""
        return (self.blocks - self.kept_blocks) * self.block_size


def plan_request(
    ranges: Sequence[tuple[int, int]], length: int, block_size: int, retained: float
) -> RequestPlan | None:
    """The plan of one request; None if no block would be freed.

    Args:
        ranges: first and last position of each image's or video's tokens; they do not overlap.
        length: tokens of the prompt.
        block_size: tokens in a block.
        retained: share of the image tokens to keep, to the nearest whole block; one of each image at least.

    Raises:
        OptionError: `retained` is not in (0, 1], or `block_size` is less than 1.
    """
    if not 0 < retained <= 1:
        raise OptionError(f"retained is {retained}; it must lie above 0 and be at most 1")
    if block_size < 1:
        raise OptionError(f"a block holds at least 1 token, not {block_size}")
    return _plan(tuple(sorted((int(a), int(b) + 1) for a, b in ranges)), length, block_size, retained)


@lru_cache(maxsize=4096)
def _plan(
    spans: tuple[tuple[int, int], ...], length: int, block_size: int, retained: float
) -> RequestPlan | None:
    if not spans:
        return None
    first = spans[0][0] // block_size
    end = min(-(-spans[-1][1] // block_size), length // block_size)  # a block that is not full stays
    start, stop = first * block_size, end * block_size
    clipped = [(max(a, start) - start, min(b, stop) - start) for a, b in spans]
    images = tuple((a, b) for a, b in clipped if a < b)
    shown = sum(b - a for a, b in images)
    text = stop - start - shown
    nearest = math.floor((text + retained * shown) / block_size + 0.5)
    kept_blocks = max(nearest, -(-(text + len(images)) // block_size))
    if not images or kept_blocks >= end - first:
        return None
    return RequestPlan(block_size, first, end - first, kept_blocks, images)
