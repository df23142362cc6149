"""The masks as span arithmetic: three integers a query, from which every fast path works.

A query at position q sees, of the keys at positions k:

* in the *front* (text that is no delimiter, and sinks where the category sees them):
  `lo[q] <= k < split[q]`;
* in the prompt itself: `max(lo[q], split[q]) <= k <= last[q]`, every token.

For a text row `split = lo`, so it sees all of `[lo, last]`. For a row of image i that sees its own
image, `split` is where image i begins: before it only the front counts, from it on everything does
(its own tokens and delimiters, and the text between its tiles). For Sink rows `split` is where the
window begins. `lo` carries padding and sliding windows, `last` causality and two-way image blocks.
This needs the images of a row not to interleave, which is checked.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from capsight.blindsight.categories import Category, MaskOptions
from capsight.blindsight.rule import BaseRule
from capsight.errors import LayoutError
from capsight.layout import RowLayout, Span, VisionBlock


@dataclass(frozen=True, slots=True)
class Chunk:
    """Which positions the keys and queries at hand cover: keys `[first_key, end)`, queries up to `end`.

    A whole prompt of S tokens is `Chunk(0, 0, S)`; the next 512 tokens after 1,000 cached ones are
    `Chunk(0, 1000, 1512)`; a sliding cache has forgotten what lies before `first_key`.

    Attributes:
        first_key: position of the first key.
        first_query: position of the first query.
        end: position after the last key, which is also the last query.
    """

    first_key: int
    first_query: int
    end: int

    def clip(self, span: Span) -> Span:
        """The part of a span that the queries cover; empty where start >= end."""
        return max(span[0], self.first_query), min(span[1], self.end)


@dataclass(frozen=True, slots=True, eq=False)
class Intervals:
    """What the queries of one row see; see the module's first lines.

    Attributes:
        front: int64 `[F]`, positions of the front keys, ascending.
        lo: int64 `[S]` per query.
        split: int64 `[S]` per query.
        last: int64 `[S]` per query; a query with `last < lo` (padding) sees nothing.
    """

    front: Tensor
    lo: Tensor
    split: Tensor
    last: Tensor

    def seen(self, rows: slice | Tensor, position: Tensor) -> Tensor:
        """The integers of some queries, written out over some keys.

        Args:
            rows: which queries (n), counted from the first of the chunk.
            position: int64 `[m]`, positions of keys that are at hand.

        Returns:
            bool `[n, m]`.
        """
        lo, split, last = (x[rows, None] for x in (self.lo, self.split, self.last))  # [n, 1]
        own = (position >= torch.maximum(lo, split)) & (position <= last)
        front = torch.isin(position, self.front) & (position >= lo) & (position < split)
        return own | front

    def pairs(self) -> Tensor:
        """How many keys each query sees: int64 `[S]`."""
        seen = torch.searchsorted(self.front, self.split) - torch.searchsorted(self.front, self.lo)
        own = self.last - torch.maximum(self.lo, self.split) + 1  # [S]
        return seen.clamp(min=0) + own.clamp(min=0)


def whole(row: RowLayout) -> Chunk:
    """The chunk of a whole row without a prefix."""
    return Chunk(0, 0, row.length)


def extents(row: RowLayout) -> list[Span]:
    """Per image (or video) of a row, from its first token or delimiter to its last vision token.

    Raises:
        LayoutError: a token or delimiter of one image lies among those of another.
    """
    spans: list[Span] = []
    reached = 0
    for image in range(row.num_images + row.num_videos):
        blocks = row.image_blocks(image)
        start = min(
            min(block.start, *block.delimiters) if block.delimiters else block.start for block in blocks
        )
        if start < reached:
            raise LayoutError(
                f"image {image} begins at {start}, before image {image - 1} with its delimiters ends at "
                f"{reached}; images that interleave have no mask"
            )
        spans.append((start, max(block.end for block in blocks)))
        reached = max(block.reach for block in blocks)
    return spans


def front_positions(row: RowLayout, category: Category, options: MaskOptions, chunk: Chunk) -> Tensor:
    """Keys that image rows of other images see: text, and sinks where the category sees them.

    Args:
        row: the layout of one prompt.
        category: of the head; Dense has no front.
        options: which tokens are sinks.
        chunk: positions outside its keys are left out.

    Returns:
        int64 `[F]`, ascending.
    """
    if category is Category.DENSE:
        return torch.empty(0, dtype=torch.int64)
    is_front = torch.zeros(row.length, dtype=torch.bool)  # [S]
    for start, end in row.text_spans:
        is_front[start:end] = True
    is_front[list(row.delimiters)] = category.sees_sinks and options.sink_delimiters
    if category.sees_sinks:
        for block, sinks in zip(row.blocks, sink_counts(row, options), strict=True):
            is_front[block.start : block.start + sinks] = True
    is_front[: chunk.first_key] = False
    return is_front[: chunk.end].nonzero().squeeze(-1)


def sink_counts(row: RowLayout, options: MaskOptions) -> list[int]:
    """How many tokens at the start of each block are sinks; an image has `sink_tokens` in all."""
    counts: list[int] = []
    image, left = -1, 0
    for block in row.blocks:
        if block.image != image:
            image, left = block.image, options.sink_tokens
        counts.append(min(left, block.num_tokens))
        left -= counts[-1]
    return counts


def intervals(
    row: RowLayout, category: Category, options: MaskOptions, rule: BaseRule, chunk: Chunk
) -> Intervals:
    """The span arithmetic of one row, category and rule.

    Args:
        row: the layout of the prompt, at least as long as the chunk.
        category: of the head.
        options: which tokens are sinks, and the window.
        rule: the layer's own.
        chunk: which keys and queries are at hand.

    Raises:
        LayoutError: images interleave.
    """
    last = torch.arange(chunk.first_query, chunk.end)  # [S]
    lo = torch.full_like(last, max(row.pad_left, chunk.first_key))
    if rule.sliding_window is not None:
        lo = torch.maximum(lo, last - rule.sliding_window + 1)
    visible = Intervals(front_positions(row, category, options, chunk), lo, lo.clone(), last)
    starts = extents(row)
    for block, sinks in zip(row.blocks, sink_counts(row, options), strict=True):
        _fill_block(visible, block, starts[block.image][0], sinks, category, options, rule, chunk)
    return visible


def _fill_block(
    visible: Intervals,
    block: VisionBlock,
    image_start: int,
    sinks: int,
    category: Category,
    options: MaskOptions,
    rule: BaseRule,
    chunk: Chunk,
) -> None:
    start, end = chunk.clip((block.start, block.end))
    if start >= end:
        return
    rows = slice(start - chunk.first_query, end - chunk.first_query)
    position = torch.arange(start, end)  # [n]
    if rule.bidirectional_images:
        visible.last[rows] = end - 1
    if category is Category.DENSE:
        return
    if category.sees_own_image:
        visible.split[rows] = image_start
        return
    visible.split[rows] = (position - options.own_window + 1).clamp(min=image_start)
    nearest = (position + options.own_window - 1).clamp(min=block.start + sinks - 1)
    visible.last[rows] = torch.minimum(visible.last[rows], nearest)
