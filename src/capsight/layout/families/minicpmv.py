"""MiniCPM-V 4.6: a whole picture between a pair of delimiters, then its slices between another pair, in rows.

The config holds none of the ids, so they are read off the prompt: the pair around the first picture of a
batch is that of pictures, and any other pair has to be one and the same, that of slices. A tag with the
number of the picture stands before it and is text. `target_sizes` has the patches of pictures and slices.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from capsight.errors import LayoutError
from capsight.layout.families.base import Supply, TokenRow, check_length, enclosing
from capsight.layout.families.rope import PlainRope
from capsight.layout.row_layout import Grid, VisionBlock


class MiniCPMV46(PlainRope):
    """Adapter for MiniCPM-V 4.6: one block per picture and one per slice."""

    model_types: tuple[str, ...] = ("minicpmv4_6",)

    def blocks(
        self, rows: Sequence[TokenRow], inputs: Mapping[str, Any], config: Any
    ) -> list[list[VisionBlock]]:
        """See `Family.blocks`."""
        images, videos = Supply(inputs, "target_sizes"), Supply(inputs, "target_sizes_videos")
        picture_pair: tuple[int | None, int | None] | None = None
        slice_pair: tuple[int | None, int | None] | None = None
        by_row: list[list[VisionBlock]] = []
        used: Counter[int | None] = Counter()
        for row in rows:
            blocks: list[VisionBlock] = []
            for span in row.runs(config.image_token_id, config.video_token_id):
                is_image = row.ids[span[0]] == config.image_token_id
                supply = images if is_image else videos
                grid = _grid(supply.take(row, span[0]), span[1] - span[0])
                check_length(row, span, grid[1] * grid[2], f"{supply.key} (merged grid {grid})")
                pair = row.at(span[0] - 1), row.at(span[1])
                picture_pair = picture_pair or pair
                if pair != picture_pair:
                    slice_pair = slice_pair or pair
                used.update(pair)
                new = pair[0] == picture_pair[0] or not blocks
                marks = enclosing(row, span, *((picture_pair if new else slice_pair) or picture_pair))  # type: ignore[arg-type]
                image = len({block.image for block in blocks}) - (not new)
                blocks.append(VisionBlock(*span, "image" if is_image else "video", grid, image, marks))
            by_row.append(blocks)
        images.finish()
        videos.finish()
        written = Counter(token for row in rows for token in row.ids[row.pad_left :])
        marks_of = (*(picture_pair or ()), *(slice_pair or ()))
        if len(set(marks_of)) < len(marks_of) or any(
            written[m] != used[m] for m in marks_of if m is not None
        ):
            raise LayoutError(
                "pictures are not each enclosed in one pair of delimiters, and slices in another one, that "
                "stand nowhere else; build the prompt with the model's own chat template and processor"
            )
        return by_row


def _grid(patches: tuple[int, ...], tokens: int) -> Grid:
    """The merged grid: a token stands for 2 x 2 or, by default, 4 x 4 patches."""
    height, width = patches
    merge = 2 if tokens * 4 == height * width else 4
    return 1, height // merge, width // merge
