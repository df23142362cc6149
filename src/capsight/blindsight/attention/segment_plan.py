"""Cuts the queries of a row into segments whose keys are few, so that each is one SDPA call."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from capsight.blindsight.attention.plan_cache import remembered
from capsight.blindsight.attention.work import Work
from capsight.blindsight.categories import Category
from capsight.blindsight.rule import CAUSAL
from capsight.blindsight.spans import Intervals, intervals
from capsight.layout import Span

PIECE = 256
"""Rows of a segment under a mask, at most: fewer means more calls, more means more masked-out work."""

WINDOW_PIECE = 128
"""The same for the rows of an image in a Sink head, which need keys as wide as the segment."""

SMALL = 128
"""Runs of fewer rows share a call with their neighbours, at the price of a mask."""

MASKED = 2**18
"""Entries of the mask of scattered text (delimiters), at most: wider calls have keys that few rows see."""

SEEN = 1024
"""From this number on, keys that all rows of a segment see are worth a call of their own, without a mask."""

CAUSAL_SLACK = 1.2
"""A causal segment may have this many times its queries in keys before them, each an empty query more."""


@dataclass(frozen=True, slots=True, eq=False)
class Segment:
    """One SDPA call, or two whose results are added up.

    Attributes:
        rows: which queries, counted from the first: a slice, or int64 `[n]`.
        seen: keys at these positions are seen by all rows, and are not among the following; may be empty.
        context: number of front keys, which come first.
        own: then the keys at these positions: the rows' own image (of text rows, all after the front).
        mask: bool `[n, m]` for those keys, or None where all is seen (or `causal` says what).
        causal: the last n keys are the queries' own, and causal; those before are all seen.
    """

    rows: slice | Tensor
    seen: Span
    context: int
    own: Span
    mask: Tensor | None
    causal: bool


@dataclass(frozen=True, slots=True, eq=False)
class SegmentPlan:
    """What to compute for the heads of one category in one row.

    Attributes:
        front: int64 `[F]`, indices of the front keys.
        segments: disjoint in their rows; together all but the padding.
    """

    front: Tensor
    segments: tuple[Segment, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the masks."""
        return sum(segment.mask.nbytes for segment in self.segments if segment.mask is not None)


@remembered
def segment_plan(work: Work, device: torch.device) -> SegmentPlan:
    """The plan of some work; remembered, since every layer asks for the same.

    Args:
        work: what is to be attended to.
        device: where indices and masks go.

    Raises:
        LayoutError: images interleave.
    """
    with torch.inference_mode(False):  # the plan outlives the call
        return _plan(work, device)


def _plan(work: Work, device: torch.device) -> SegmentPlan:
    visible = intervals(work.row, work.category, work.options, work.rule, work.chunk)
    segments = [_segment(work, visible, rows) for rows in _merged(list(_pieces(work, visible)))]
    moved = tuple(
        Segment(
            s.rows.to(device) if isinstance(s.rows, Tensor) else s.rows,
            s.seen,
            s.context,
            s.own,
            None if s.mask is None else s.mask.to(device),
            s.causal,
        )
        for s in segments
    )
    return SegmentPlan((visible.front - work.chunk.first_key).to(device), moved)


@dataclass(frozen=True, slots=True)
class _Piece:
    """Neighbouring rows `span`, of text or of one block; `whole` pieces are not to be merged."""

    span: Span
    is_text: bool
    whole: bool


def _pieces(work: Work, visible: Intervals) -> Iterator[_Piece]:
    sparse = work.category is not Category.DENSE
    runs = [(span, True) for span in (work.row.text_spans if sparse else ((0, work.chunk.end),))]
    runs += [((block.start, block.end), False) for block in work.row.blocks if sparse]
    for run, is_text in runs:
        start, end = work.chunk.clip(run)
        start = max(start, work.first_row)
        if start >= end:
            continue
        if _one_call(work, visible, (start, end), is_text):
            yield _Piece((start, end), is_text, True)
            continue
        step = PIECE if is_text or work.category.sees_own_image else WINDOW_PIECE
        for first in range(start, end, step):
            yield _Piece((first, min(first + step, end)), is_text, False)


def _one_call(work: Work, visible: Intervals, span: Span, is_text: bool) -> bool:
    """Whether a run of rows needs no mask: all see the same, or it is causal and short of keys before it."""
    if not is_text and not work.category.sees_own_image:
        return False
    if work.category is not Category.DENSE and span[1] - span[0] < SMALL:
        return False
    if work.rule.bidirectional_images and not is_text:
        return work.rule.sliding_window is None
    if work.rule != CAUSAL and (work.rule.sliding_window is not None or work.category is Category.DENSE):
        return False
    context, own = _keys(visible, slice(span[0] - work.chunk.first_query, span[1] - work.chunk.first_query))
    before = context + span[0] - own[0]
    return before <= CAUSAL_SLACK * (span[1] - span[0])


def _keys(visible: Intervals, rows: slice | Tensor) -> tuple[int, Span]:
    """The front keys (how many of the first) and then own keys (where) that cover what these rows see."""
    lo, split = visible.lo[rows], visible.split[rows]
    start = int(torch.maximum(lo, split).min())
    context = int((visible.front < start).sum()) if bool((split > lo).any()) else 0
    return context, (start, int(visible.last[rows].max()) + 1)


def _seen_by_all(visible: Intervals, rows: slice | Tensor, own: Span) -> Span:
    """The first own keys, if all rows see them and they are many; never the last key that a row sees."""
    starts = torch.maximum(visible.lo[rows], visible.split[rows])
    end = int(visible.last[rows].min())
    many = end - own[0] >= SEEN and int(starts.max()) == own[0]
    return own[0], end if many else own[0]


def _merged(pieces: list[_Piece]) -> Iterator[list[_Piece]]:
    """Small pieces merged, text with text and image with image, up to PIECE rows."""
    group: list[_Piece] = []
    for piece in pieces:
        if group and not _fits(group, piece):
            yield group
            group = []
        group.append(piece)
    if group:
        yield group


def _fits(group: list[_Piece], piece: _Piece) -> bool:
    rows = sum(p.span[1] - p.span[0] for p in (*group, piece))
    width = piece.span[1] - group[0].span[0]
    near = rows * width <= MASKED if piece.is_text else width <= rows + PIECE
    alike = piece.is_text == group[0].is_text and not (piece.whole or group[-1].whole)
    return alike and near and rows <= PIECE


def _segment(work: Work, visible: Intervals, pieces: list[_Piece]) -> Segment:
    first = work.chunk.first_query
    spans = [(p.span[0] - first, p.span[1] - first) for p in pieces]
    neighbours = sum(end - start for start, end in spans) == spans[-1][1] - spans[0][0]
    rows: slice | Tensor = slice(spans[0][0], spans[-1][1])
    if not neighbours:
        rows = torch.cat([torch.arange(*span) for span in spans])  # [n]
    context, own = _keys(visible, rows)
    if pieces[0].whole:
        two_way = work.rule.bidirectional_images and not pieces[0].is_text
        return Segment(rows, (own[0], own[0]), context, own, None, not two_way)
    seen = _seen_by_all(visible, rows, own)
    own = seen[1], own[1]
    mask = visible.seen(rows, torch.cat((visible.front[:context], torch.arange(*own))))  # [n, m]
    return Segment(rows, seen, context, own, None if mask.all() else mask, False)
