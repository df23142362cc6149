"""MiniCPM-V 4.7: written as 4.6 is; positions lie on a canvas, which a picture's slices make up.

The whole picture is stretched over the canvas, each slice lies in its place, and the markers at the corners
of what they enclose: `<image>` one step before the canvas, `</image>` behind its far corner, a newline at the
right end of its row of slices. Text goes on one step behind the canvas' longer side.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import groupby, pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from capsight.layout.families.base import TokenRow
from capsight.layout.families.minicpmv import MiniCPMV46
from capsight.layout.row_layout import RowLayout, VisionBlock


class MiniCPMV47(MiniCPMV46):
    """Adapter for MiniCPM-V 4.7: markers and newlines behind a block are its delimiters, too."""

    model_types: tuple[str, ...] = ("minicpmv4_7",)
    position_rows: int = 3

    def blocks(
        self, rows: Sequence[TokenRow], inputs: Mapping[str, Any], config: Any
    ) -> list[list[VisionBlock]]:
        """See `Family.blocks`."""
        by_row = super().blocks(rows, inputs, config)
        marks = (config.image_start_id, config.image_end_id, config.slice_start_id, config.slice_end_id)
        return [
            _with_markers(row, blocks, (*marks, config.newline_id))
            for row, blocks in zip(rows, by_row, strict=True)
        ]

    def row_positions(self, row: RowLayout, config: Any) -> NDArray[np.int64]:
        """See `Family.row_positions`."""
        positions = np.zeros((3, row.length), np.int64)
        token, position = row.pad_left, 0
        for _, group in groupby(row.blocks, key=lambda block: block.image):
            picture, *slices = group
            text = max(picture.start - 1 - token, 0)
            positions[:, token : token + text] = position + np.arange(text)
            token, position = _frame(positions, picture, slices, position + text)
        positions[:, token:] = position + np.arange(row.length - token)
        return positions


def _with_markers(row: TokenRow, blocks: list[VisionBlock], marks: tuple[int, ...]) -> list[VisionBlock]:
    limits = [*(block.delimiters[0] for block in blocks[1:]), len(row.ids)][: len(blocks)]
    marked = []
    for block, limit in zip(blocks, limits, strict=True):
        end = block.reach
        while end < limit and row.ids[end] in marks:
            end += 1
        marked.append(replace(block, delimiters=(*block.delimiters, *range(block.reach, end))))
    return marked


def _frame(
    positions: NDArray[np.int64], picture: VisionBlock, slices: list[VisionBlock], origin: int
) -> tuple[int, int]:
    """Write the positions of a picture and its slices; the token and the position that come after them."""
    size = np.array(picture.grid[1:])
    columns = next((k for k, (a, b) in enumerate(pairwise(slices), 1) if b.start - a.end > 2), len(slices))
    if slices:
        if len(slices) % columns:
            columns = len(slices)
        part = np.array(slices[0].grid[1:])
        size = part * (len(slices) // columns, columns)
    start, end = picture.start - 1, (slices or [picture])[-1].reach
    positions[:, start:end] = origin
    positions[1:, start] = max(origin - 1, 0)
    positions[1:, picture.end] = origin + size
    _place(
        positions, picture, origin, *(_stretched(*pair) for pair in zip(size, picture.grid[1:], strict=True))
    )
    for k, block in enumerate(slices):
        corner = origin + part * divmod(k, columns)
        positions[1:, block.start - 1] = corner
        positions[1:, block.end] = corner + block.grid[1:] - 1
        _place(
            positions, block, 0, *(at + np.arange(n) for at, n in zip(corner, block.grid[1:], strict=True))
        )
        positions[0, block.start : block.end] = origin
    for k, (block, after) in enumerate(pairwise(slices)):
        if after.start - block.end > 2:
            row_end = (k // columns + 1) * part[0] - 1, columns * part[1]
            positions[1:, block.end + 1 : after.start - 1] = origin + np.array(row_end)[:, None]
    return end, origin + int(size.max()) + 1


def _place(
    positions: NDArray[np.int64],
    block: VisionBlock,
    origin: int,
    rows: NDArray[np.int64],
    columns: NDArray[np.int64],
) -> None:
    coordinates = positions[:, block.start : block.end]
    coordinates[0] = origin
    coordinates[1:] = origin + np.stack(np.meshgrid(rows, columns, indexing="ij")).reshape(2, -1)


def _stretched(canvas: int, count: int) -> NDArray[np.int64]:
    """`count` places over a side of the canvas, rounded as the model rounds them (float32)."""
    return torch.linspace(0, int(canvas) - 1, count).round().long().numpy()
