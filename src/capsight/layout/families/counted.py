"""EXAONE 4.5, LightOnOCR and VideoLLaMA 3: a run of image tokens is cut into images by their sizes alone.

None of them has delimiters that belong to the model, and their language models have one position a token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from capsight.errors import LayoutError
from capsight.layout.families.base import Supply, TokenRow, check_length
from capsight.layout.families.rope import PlainRope
from capsight.layout.row_layout import Grid, Kind, RowLayout, VisionBlock


class Counted(PlainRope):
    """Adapter for EXAONE 4.5, LightOnOCR and VideoLLaMA 3: one block per image or clip."""

    model_types: tuple[str, ...] = ("exaone4_5", "lighton_ocr", "video_llama_3")

    def blocks(
        self, rows: Sequence[TokenRow], inputs: Mapping[str, Any], config: Any
    ) -> list[list[VisionBlock]]:
        """See `Family.blocks`."""
        if config.model_type == "video_llama_3" and inputs.get("pixel_values_videos") is not None:
            raise LayoutError("VideoLLaMA 3 leaves out tokens of frames that are alike; give it pictures")
        images = Supply(inputs, "image_sizes" if config.model_type == "lighton_ocr" else "image_grid_thw")
        videos, merges = Supply(inputs, "video_grid_thw"), _merges(inputs, config)
        by_row: list[list[VisionBlock]] = []
        for row in rows:
            blocks: list[VisionBlock] = []
            for start, end in row.runs(config.image_token_id, getattr(config, "video_token_id", -1)):
                is_image = row.ids[start] == config.image_token_id
                supply = images if is_image else videos
                while start < end:
                    merge = merges[min(supply.used, len(merges) - 1)]
                    grid = _grid(supply.take(row, start), merge)
                    stop = start + grid[0] * grid[1] * grid[2]
                    if stop > end:
                        check_length(row, (start, end), stop - start, f"{supply.key} (merged grid {grid})")
                    kind: Kind = "image" if is_image else "video"
                    blocks.append(VisionBlock(start, stop, kind, grid, len(blocks)))
                    start = stop
            by_row.append(blocks)
        images.finish()
        videos.finish()
        return by_row

    def row_positions(self, row: RowLayout, config: Any) -> NDArray[np.int64]:
        """See `Family.row_positions`. EXAONE 4.5 numbers padding, too."""
        if config.model_type == "exaone4_5":
            return np.tile(np.arange(row.length), (3, 1))
        return super().row_positions(row, config)


def _merges(inputs: Mapping[str, Any], config: Any) -> list[int]:
    """By how much each image's sides are merged; one number where it is the same for all."""
    if config.model_type == "lighton_ocr":  # its sizes are in pixels
        return [config.vision_config.patch_size * config.spatial_merge_size]
    if config.model_type == "exaone4_5":
        return [config.vision_config.spatial_merge_size]
    given = inputs.get("image_merge_sizes")
    return [1] if given is None else [int(merge) for merge in given]


def _grid(sizes: tuple[int, ...], merge: int) -> Grid:
    *t, h, w = sizes
    return (t[0] if t else 1), h // merge, w // merge
