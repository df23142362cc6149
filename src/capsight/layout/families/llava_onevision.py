"""LLaVA-OneVision: no delimiters; a run of image tokens is cut into images by counting.

A prompt's only image is written as the whole picture at base resolution, then the picture in tiles
put together, one newline token at the end of each row of patches. An image among several is the base
resolution and one newline token, and so is a video after its pooled frames. These last newline tokens
count as the block's delimiter; those at the ends of rows are the last column of the block's grid.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from capsight.errors import LayoutError
from capsight.layout.families.base import Supply, TokenRow, check_length
from capsight.layout.families.rope import PlainRope
from capsight.layout.row_layout import Grid, Kind, Span, VisionBlock


class LlavaOnevision(PlainRope):
    """Adapter for LLaVA-OneVision: two blocks for a lone image, one for others and for videos."""

    model_types: tuple[str, ...] = ("llava_onevision",)

    def blocks(
        self, rows: Sequence[TokenRow], inputs: Mapping[str, Any], config: Any
    ) -> list[list[VisionBlock]]:
        """See `Family.blocks`."""
        sizes, alone, frames = Supply(inputs, "image_sizes"), _alone(inputs), _frames(inputs)
        by_row: list[list[VisionBlock]] = []
        for row in rows:
            blocks: list[VisionBlock] = []
            for span in row.runs(config.image_token_id, config.video_token_id):
                if row.ids[span[0]] == config.image_token_id:
                    blocks += _images(row, span, _next(blocks), sizes, alone, config)
                else:
                    blocks += _videos(row, span, _next(blocks), frames, config)
            by_row.append(blocks)
        sizes.finish()
        frames.finish()
        return by_row


def _next(blocks: list[VisionBlock]) -> int:
    return blocks[-1].image + 1 if blocks else 0


def _alone(inputs: Mapping[str, Any]) -> list[bool]:
    """For each image of the batch, whether the processor treated it as its prompt's only image."""
    counts = inputs.get("batch_num_images")
    if counts is None:
        if inputs.get("image_sizes") is not None:
            raise LayoutError("the layout needs 'batch_num_images'; pass the processor's outputs as they are")
        return []
    return [int(count) == 1 for count in counts for _ in range(int(count))]


def _images(
    row: TokenRow, span: Span, image: int, sizes: Supply, alone: list[bool], config: Any
) -> list[VisionBlock]:
    blocks: list[VisionBlock] = []
    start = span[0]
    while start < span[1]:
        if sizes.used == len(alone) < len(sizes.entries):
            raise row.error("batch_num_images counts fewer images than image_sizes holds")
        is_alone = alone[sizes.used] if sizes.used < len(alone) else False
        size = sizes.take(row, start)
        grids = [_base_grid(config)] + ([_detail_grid(size, config)] if is_alone else [])
        tokens = sum(h * w for _, h, w in grids) + (0 if is_alone else 1)
        if start + tokens > span[1]:
            check_length(row, (start, span[1]), tokens, f"an image of size {size}")
        blocks += _in_a_row(start, grids, "image", image, newline=not is_alone)
        start, image = start + tokens, image + 1
    return blocks


def _frames(inputs: Mapping[str, Any]) -> Supply:
    """For each video of the batch, its number of frames."""
    pixels = inputs.get("pixel_values_videos")
    counts = None if pixels is None else [(len(video),) for video in pixels]
    return Supply({"pixel_values_videos": counts}, "pixel_values_videos")


def _videos(row: TokenRow, span: Span, image: int, frames: Supply, config: Any) -> list[VisionBlock]:
    blocks: list[VisionBlock] = []
    start = span[0]
    _, h, w = _base_grid(config)
    h, w = math.ceil(h / 2), math.ceil(w / 2)
    while start < span[1]:
        (t,) = frames.take(row, start)
        tokens = t * h * w + 1
        if start + tokens > span[1]:
            check_length(row, (start, span[1]), tokens, f"a video of {t} frames")
        blocks += _in_a_row(start, [(t, h, w)], "video", image, newline=True)
        start, image = start + tokens, image + 1
    return blocks


def _in_a_row(start: int, grids: list[Grid], kind: Kind, image: int, newline: bool) -> list[VisionBlock]:
    blocks: list[VisionBlock] = []
    for grid in grids:
        end = start + grid[0] * grid[1] * grid[2]
        blocks.append(VisionBlock(start, end, kind, grid, image, (end,) if newline else ()))
        start = end
    return blocks


def _base_grid(config: Any) -> Grid:
    side = config.vision_config.image_size // config.vision_config.patch_size
    return 1, side, side


def _detail_grid(size: tuple[int, ...], config: Any) -> Grid:
    """Patches of the tiled picture, scaled down where there are too many; plus the newline column."""
    side = _base_grid(config)[1]
    rows, columns = unpadded(size, side, config)
    most = int(config.vision_aspect_ratio.removeprefix("anyres_max_"))
    ratio = math.sqrt(rows * columns / (most * side**2))
    if ratio > 1.1:
        rows, columns = int(rows // ratio), int(columns // ratio)
    return 1, rows, columns + 1


def unpadded(size: tuple[int, ...], side: int, config: Any) -> tuple[int, int]:
    """Rows and columns of patches of the tiled picture without its padding.

    The arithmetic, rounding included, is that of the model's `pack_image_features`.

    Args:
        size: `(height, width)` of the picture in pixels.
        side: patches along a tile.
        config: the model's.
    """
    height, width = size
    pixels = config.vision_config.image_size
    best = _best_resolution(height, width, config.image_grid_pinpoints)
    rows, columns = best[0] // pixels * side, best[1] // pixels * side
    if width / height > columns / rows:
        rows -= (rows - int(round(height * (columns / width), 7))) // 2 * 2
    else:
        columns -= (columns - int(round(width * (rows / height), 7))) // 2 * 2
    return rows, columns


def _best_resolution(height: int, width: int, resolutions: Sequence[Sequence[int]]) -> Sequence[int]:
    """The `(height, width)` that shows most of a picture scaled into it and, of these, wastes least.

    The same as transformers' `select_best_resolution`, without importing torch for it.
    """

    def fit(resolution: Sequence[int]) -> tuple[int, int]:
        scale = min(resolution[1] / width, resolution[0] / height)
        shown = min(int(width * scale) * int(height * scale), width * height)
        return shown, shown - resolution[0] * resolution[1]

    return max(resolutions, key=fit)
