"""Lays queries and keys out in tiles for FlexAttention, and lists the tiles that have to be computed.

Key order: the front keys, then each image (from its first delimiter on, starting a tile of its own if
it is large enough), then the text outside images. Front keys that lie in images or between them are
there twice; a code per slot tells the two apart. Query order: text rows, then images likewise. So a
tile of image rows meets a few front tiles and its own image, whatever the prompt's length, and a
delimiter between two images costs no tile of image rows its sparsity.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from capsight.blindsight.attention.plan_cache import remembered
from capsight.blindsight.attention.work import Work
from capsight.blindsight.categories import Category
from capsight.blindsight.spans import Intervals, extents, intervals

TILE = 128
"""Rows and columns of a tile."""

ALIGN_SLACK = 0.25
"""A run starts a tile of its own if that leaves at most this fraction of its slots empty."""

OWN = 1 << 28
"""Added to the position of a key that is there as itself, not as a front key."""


@dataclass(frozen=True, slots=True, eq=False)
class FlexPlan:
    """Gathers, the three integers a query of `spans.Intervals`, and the tiles; Q and K are multiples of 128.

    A query sees a key slot of code c if `lo <= c < split` or `own <= c <= last`.

    Attributes:
        rows: int64 `[Q]`, which query lies in a slot; 0 in empty slots.
        slots: int64 `[S']`, the slots that hold a query...
        targets: int64 `[S']`, ...and which query it is.
        keys: int64 `[K]`, which key lies in a slot; 0 in empty slots.
        bounds: int32 `[4, Q]`: lo, split, own, last.
        codes: int32 `[K]`; -1 in empty slots.
        partial_count: int32 `[1, 1, Q/128]`, tiles per row of tiles that need the mask...
        partial: int32 `[1, 1, Q/128, K/128]`, ...and which (the first so many).
        full_count: as `partial_count`, for tiles in which all is seen.
        full: as `partial`.
    """

    rows: Tensor
    slots: Tensor
    targets: Tensor
    keys: Tensor
    bounds: Tensor
    codes: Tensor
    partial_count: Tensor
    partial: Tensor
    full_count: Tensor
    full: Tensor

    def to(self, device: torch.device) -> FlexPlan:
        """This plan on another device."""
        return FlexPlan(*(getattr(self, name).to(device) for name in self.__slots__))

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(getattr(self, name).nbytes for name in self.__slots__)

    def tiles(self) -> int:
        """How many tiles are computed for each head."""
        return int(self.partial_count.sum() + self.full_count.sum())


@remembered
def flex_plan(work: Work, device: torch.device) -> FlexPlan:
    """The plan of some work; remembered, since every layer asks for the same.

    Raises:
        LayoutError: images interleave.
    """
    with torch.inference_mode(False):  # the plan outlives the call
        return _plan(work).to(device)


def _plan(work: Work) -> FlexPlan:
    visible = intervals(work.row, work.category, work.options, work.rule, work.chunk)
    row_slots, is_text = _query_slots(work)  # [Q] positions, -1 empty
    key_slots, codes, is_rest = _key_slots(work, visible)  # [K]
    filled = row_slots >= 0
    rows = (row_slots - work.chunk.first_query).clamp(min=0)  # [Q]
    own_start = torch.maximum(visible.lo, visible.split) + OWN
    bounds = torch.stack((visible.lo, visible.split, own_start, visible.last + OWN))[:, rows]  # [4, Q]
    partial, full = _tiles(bounds, filled, codes)
    apart = is_rest[None, :] & ~is_text[:, None]  # image rows see no text outside images but in front
    partial_count, partial_list = _lists(partial & ~apart)
    full_count, full_list = _lists(full & ~apart)
    bounds[:, ~filled] = torch.tensor([[0], [0], [OWN], [-1]])
    return FlexPlan(
        rows=rows,
        slots=filled.nonzero().squeeze(-1),
        targets=rows[filled],
        keys=(key_slots - work.chunk.first_key).clamp(min=0),
        bounds=bounds.int(),
        codes=codes.int(),
        partial_count=partial_count,
        partial=partial_list,
        full_count=full_count,
        full=full_list,
    )


def _query_slots(work: Work) -> tuple[Tensor, Tensor]:
    """Position of the query in each slot `[Q]`, and which tiles `[Q / 128]` hold text rows."""
    text, images = [(work.first_row, work.chunk.end)], []
    if work.category is not Category.DENSE:
        text, images = list(work.row.text_spans), [(block.start, block.end) for block in work.row.blocks]
    cut = [[_range(work, span) for span in spans] for spans in (text, images)]
    first = _pack([torch.cat(cut[0])] if cut[0] else [])
    slots = _at_least_two_tiles(torch.cat((first, _pack(cut[1]))))
    return slots, torch.arange(len(slots) // TILE) < len(first) // TILE


def _range(work: Work, span: tuple[int, int]) -> Tensor:
    start, end = work.chunk.clip(span)
    start = max(start, work.first_row)
    return torch.arange(start, max(start, end))


def _key_slots(work: Work, visible: Intervals) -> tuple[Tensor, Tensor, Tensor]:
    """Position and code of the key in each slot `[K]`; which tiles `[K / 128]` are text outside images."""
    chunk = work.chunk
    spans = [] if work.category is Category.DENSE else extents(work.row)
    outside = torch.ones(chunk.end, dtype=torch.bool)  # [T]
    outside[: max(chunk.first_key, work.row.pad_left)] = False
    images = []
    for start, end in spans:
        image = torch.arange(max(start, chunk.first_key), max(min(end, chunk.end), start, chunk.first_key))
        outside[image] = False
        images.append(image)
    parts = [_pack([visible.front]), _pack(images), _pack([outside.nonzero().squeeze(-1)])]
    slots = _at_least_two_tiles(torch.cat(parts))
    is_own = torch.arange(len(slots)) >= len(parts[0])
    codes = torch.where(slots >= 0, slots + OWN * is_own, -1)
    rest = sum(len(part) for part in parts[:2]) // TILE if spans else len(slots)
    return slots, codes, torch.arange(len(slots) // TILE) >= rest


def _pack(runs: list[Tensor]) -> Tensor:
    """Runs of positions in one row of slots, -1 where none is; whole tiles."""
    parts: list[Tensor] = []
    length = 0
    for run in (run for run in runs if len(run)):
        waste = -len(run) % TILE
        if waste <= ALIGN_SLACK * len(run):
            parts.append(torch.full((-length % TILE,), -1))
            length += -length % TILE
        parts.append(run)
        length += len(run)
    return torch.cat((*parts, torch.full((-length % TILE,), -1)))


def _at_least_two_tiles(slots: Tensor) -> Tensor:
    """One tile would be a shape of its own to the compiler, and none would be no shape at all."""
    return torch.cat((slots, torch.full((max(2 * TILE - len(slots), 0),), -1)))


def _tiles(bounds: Tensor, filled: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """Which tiles need the mask and which are seen whole: bool `[Q / 128, K / 128]` each.

    From the extremes of each row and column of tiles alone; a tile may be listed that turns out empty.
    """
    far = 1 << 40
    low = bounds.where(filled, far).view(4, -1, TILE).amin(-1)[..., None]  # [4, Q / 128, 1]
    high = bounds.where(filled, -far).view(4, -1, TILE).amax(-1)[..., None]
    there = codes >= 0
    first = codes.where(there, far).view(-1, TILE).amin(-1)[None, :]  # [1, K / 128]
    final = codes.where(there, -far).view(-1, TILE).amax(-1)[None, :]
    packed = there.view(-1, TILE).all(-1)[None, :]
    front = (first < high[1]) & (final >= low[0]) & (final < OWN)
    own = (first <= high[3]) & (final >= low[2])
    whole_front = (first >= high[0]) & (final < low[1])
    whole_own = (first >= high[2]) & (final <= low[3])
    full = packed & (whole_front | whole_own)
    return (front | own) & ~full, full & filled.view(-1, TILE).any(-1)[:, None]


def _lists(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """How many tiles each row has `[1, 1, Q / 128]`, and their columns first `[1, 1, Q / 128, K / 128]`."""
    columns = torch.argsort(~tiles, dim=-1, stable=True)
    return tiles.sum(-1).int()[None, None], columns.int()[None, None].contiguous()
