"""Which blocks of paged memory a request's images shrink into, as plain integers: `Slots` and `Latents`.

vLLM's scheduler (which frees blocks) and its workers (which fill and read them) both ask these functions, in
processes of their own, so they may depend on nothing but their arguments.

All blocks from the first image's first token to the last image's last one are a *region*. When the prompt has
been read, what is kept of the region is written to the region's last blocks, and the blocks in front of them
are freed as they are. With slots, every KV head keeps all text in between, and as many image tokens as fit;
with latents, text is followed by a latent of each image token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from capsight.errors import OptionError

Ranges = Sequence[tuple[int, int]]
"""First and last position of the tokens of each image or video of a prompt; they do not overlap."""


@dataclass(frozen=True, slots=True)
class BlockPlan:
    """How the region of one prompt shrinks, in every layer and head alike.

    Attributes:
        block_size: tokens in a block.
        first: index of the region's first block in the request's block table.
        blocks: blocks of the region.
        kept_blocks: blocks of it that stay, the last ones.
        images: `[start, end)` of each image, counted from the region's first token.
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
        """Tokens of `images`."""
        return sum(self.sizes)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Tokens of each image."""
        return tuple(end - start for start, end in self.images)

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


@dataclass(frozen=True, slots=True)
class RequestPlan(BlockPlan):
    """How a region shrinks to slots, all of which are filled; images end where the region does."""

    @property
    def kept_image_tokens(self) -> int:
        """Image tokens that every head keeps."""
        return self.kept_blocks * self.block_size - (self.tokens - self.image_tokens)


@dataclass(frozen=True, slots=True)
class LatentPlan(BlockPlan):
    """How a region shrinks to text and latents.

    Images may go on behind the region, in the block that is not full; they have latents of all their tokens.

    Attributes:
        reach: tokens from the region's first one to the end of what is written: of the region, or of the last
            image behind it. What follows stays where it is.
    """

    reach: int

    @property
    def text_tokens(self) -> int:
        """Tokens that are written as they are."""
        return self.reach - self.image_tokens

    @property
    def after(self) -> int:
        """Position in the prompt of the first token that stays where it is."""
        return self.first * self.block_size + self.reach


@dataclass(frozen=True, slots=True)
class Slots:
    """Capsules that are whole tokens of each KV head.

    Attributes:
        retained: share of a prompt's image tokens that stays, in (0, 1].
    """

    retained: float

    def plan(self, ranges: Ranges, length: int, block_size: int) -> RequestPlan | None:
        """See `plan_request`."""
        return plan_request(ranges, length, block_size, self.retained)


@dataclass(frozen=True, slots=True)
class Latents:
    """Capsules that are one latent per image token, for all layers.

    Memory of a block in one layer takes first the text, then every layer's equal share of the latents.

    Attributes:
        layers: that share latents.
        latent_nbytes: bytes of a latent.
        token_nbytes: bytes of one token's keys and values in one layer.
    """

    layers: int
    latent_nbytes: int
    token_nbytes: int

    def share(self, tokens: int) -> int:
        """Latents in each layer's memory, of so many in all; the last layers may have fewer."""
        return -(-tokens // self.layers)

    def plan(self, ranges: Ranges, length: int, block_size: int) -> LatentPlan | None:
        """The plan of one request; None if no block would be freed: then its images stay as they are.

        Args:
            ranges: of the prompt's images.
            length: tokens of the prompt.
            block_size: tokens in a block.
        """
        spans = tuple(sorted((int(a), int(b) + 1) for a, b in ranges))
        return _latent_plan(self, spans, length, block_size)


def plan_request(ranges: Ranges, length: int, block_size: int, retained: float) -> RequestPlan | None:
    """The plan of one request with slots; None if no block would be freed.

    Args:
        ranges: of the prompt's images.
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
    first, end = _region(spans, length, block_size)
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


def _region(spans: Sequence[tuple[int, int]], length: int, block_size: int) -> tuple[int, int]:
    """First block of a region, and the one behind its last; a block that is not full is none of it."""
    return spans[0][0] // block_size, min(-(-spans[-1][1] // block_size), length // block_size)


@lru_cache(maxsize=4096)
def _latent_plan(
    kind: Latents, spans: tuple[tuple[int, int], ...], length: int, block_size: int
) -> LatentPlan | None:
    if not spans:
        return None
    first, end = _region(spans, length, block_size)
    start = first * block_size
    images = tuple((a - start, b - start) for a, b in spans)
    reach = max(end * block_size - start, images[-1][1])
    shown = sum(b - a for a, b in images)
    nbytes = (reach - shown) * kind.token_nbytes + kind.share(shown) * kind.latent_nbytes
    kept_blocks = -(-nbytes // (block_size * kind.token_nbytes))
    if kept_blocks >= end - first:
        return None
    return LatentPlan(block_size, first, end - first, kept_blocks, images, reach)
