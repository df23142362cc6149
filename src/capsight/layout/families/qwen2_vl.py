"""Qwen2-VL: `<|vision_start|>` tokens `<|vision_end|>` around each image and around each whole video.

PaddleOCR-VL writes the same with delimiters of other names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from capsight.layout.families.base import Supply, TokenRow, check_length, enclosing
from capsight.layout.families.rope import MRope
from capsight.layout.row_layout import Grid, Kind, VisionBlock


class Qwen2VL(MRope):
    """Adapter for both: one block per image or clip, its merged grid from `*_grid_thw`."""

    model_types: tuple[str, ...] = ("qwen2_vl", "paddleocr_vl")

    def blocks(
        self, rows: Sequence[TokenRow], inputs: Mapping[str, Any], config: Any
    ) -> list[list[VisionBlock]]:
        """See `Family.blocks`."""
        images, videos = Supply(inputs, "image_grid_thw"), Supply(inputs, "video_grid_thw")
        by_row = [self._row(row, images, videos, config) for row in rows]
        images.finish()
        videos.finish()
        return by_row

    def _row(self, row: TokenRow, images: Supply, videos: Supply, config: Any) -> list[VisionBlock]:
        blocks: list[VisionBlock] = []
        for span in row.runs(config.image_token_id, config.video_token_id):
            is_image = row.ids[span[0]] == config.image_token_id
            kind: Kind = "image" if is_image else "video"
            supply = images if is_image else videos
            grid = merged_grid(supply.take(row, span[0]), config)
            check_length(row, span, grid[0] * grid[1] * grid[2], f"{supply.key} (merged grid {grid})")
            delimiters = enclosing(row, span, config.vision_start_token_id, config.vision_end_token_id)
            blocks.append(VisionBlock(*span, kind, grid, len(blocks), delimiters))
        return blocks


def merged_grid(grid_thw: tuple[int, ...], config: Any) -> Grid:
    """The token grid `(t, h, w)` after the vision tower has merged patches, from the patch grid."""
    t, h, w = grid_thw
    merge = config.vision_config.spatial_merge_size
    return t, h // merge, w // merge
