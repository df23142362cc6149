"""Gemma 4: `<boi>` soft tokens `<eoi>`, as many as a picture's shape and the processor's budget give.

The shape of the grid is read off `image_position_ids` (patch columns and rows, -1 in padding); without
them a block is a line. A video is written frame by frame, each with its time before it and with the
video token; `num_frames_per_video` says which frames are one video, without it each is one of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from capsight.errors import LayoutError
from capsight.layout.families.base import TokenRow, check_length, enclosing
from capsight.layout.families.rope import PlainRope
from capsight.layout.row_layout import Grid, VisionBlock


class Gemma4(PlainRope):
    """Adapter for Gemma 4 and Gemma 4 Unified: one block per image or video frame."""

    model_types: tuple[str, ...] = ("gemma4", "gemma4_unified")

    def refusal(self, config: Any) -> str | None:
        """See `Family.refusal`."""
        text = config.get_text_config(decoder=True)
        if getattr(text, "num_kv_shared_layers", 0):
            return (
                f"the last {text.num_kv_shared_layers} layers of this Gemma 4 (E2B, E4B) reuse the keys and "
                "values of earlier layers, which then would see tokens that capsules have dropped"
            )
        if getattr(text, "use_bidirectional_attention", None) == "all":
            return "all tokens of this Gemma 4 attend to each other, so that it has no cache to go on from"
        return None

    def blocks(
        self, rows: Sequence[TokenRow], inputs: Mapping[str, Any], config: Any
    ) -> list[list[VisionBlock]]:
        """See `Family.blocks`."""
        grids, used = _grids(inputs, config), 0
        counts = inputs.get("num_frames_per_video")
        frames, left = iter([] if counts is None else [int(n) for n in counts]), 0
        by_row: list[list[VisionBlock]] = []
        for row in rows:
            blocks: list[VisionBlock] = []
            image = -1
            for span in row.runs(config.image_token_id, config.video_token_id):
                is_image = row.ids[span[0]] == config.image_token_id
                grid: Grid = (1, 1, span[1] - span[0])
                if is_image or not left:
                    image, left = image + 1, 0 if is_image else next(frames, 1)
                left -= not is_image
                if is_image and grids is not None:
                    if used == len(grids):
                        raise row.error(
                            f"vision tokens at {span[0]} have no entry left in image_position_ids; pass the "
                            "processor's outputs for the whole batch"
                        )
                    grid, used = grids[used], used + 1
                    check_length(row, span, grid[1] * grid[2], f"image_position_ids (merged grid {grid})")
                pair = enclosing(row, span, config.boi_token_id, config.eoi_token_id)
                blocks.append(VisionBlock(*span, "image" if is_image else "video", grid, image, pair))
            by_row.append(blocks)
        if left or next(frames, None) is not None:
            raise LayoutError(
                "num_frames_per_video calls for more frames than the prompts hold; the prompt was truncated "
                "or a placeholder is missing"
            )
        if grids is not None and used < len(grids):
            raise LayoutError(
                f"image_position_ids has {len(grids)} entries, but the prompts hold tokens for {used}; "
                "the prompt was truncated or a placeholder is missing"
            )
        return by_row


def _grids(inputs: Mapping[str, Any], config: Any) -> list[Grid] | None:
    """The merged grid of every image of the batch."""
    if inputs.get("image_position_ids") is None:
        return None
    # Patches of 48 pixels in the unified model are merged already; elsewhere 3 x 3 patches make a token.
    merge = 1 if config.model_type == "gemma4_unified" else config.vision_config.pooling_kernel_size
    largest = np.asarray(inputs["image_position_ids"]).max(-2)  # [images, 2]: last column, last row
    return [(1, int(y + 1) // merge, int(x + 1) // merge) for x, y in largest]
