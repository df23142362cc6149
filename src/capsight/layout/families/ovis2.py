"""Ovis2: `<IMG_START>` picture `<IMG_GRID>`, tiles with `<IMG_COL>` or `<IMG_ROW>` between, `<IMG_END>`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from capsight.layout.families.base import TokenRow, check_length, check_pictures, square
from capsight.layout.families.rope import PlainRope
from capsight.layout.row_layout import VisionBlock


class Ovis2(PlainRope):
    """Adapter for Ovis2: one square block for the picture and one per tile."""

    model_types: tuple[str, ...] = ("ovis2",)

    def blocks(
        self, rows: Sequence[TokenRow], inputs: Mapping[str, Any], config: Any
    ) -> list[list[VisionBlock]]:
        """See `Family.blocks`."""
        vision = config.vision_config
        tokens = (vision.image_size // vision.patch_size // vision.hidden_stride) ** 2
        by_row = [self._row(row, tokens, config.visual_indicator_token_ids, config) for row in rows]
        check_pictures(inputs, sum(len(blocks) for blocks in by_row))
        return by_row

    def _row(self, row: TokenRow, tokens: int, marks: Sequence[int], config: Any) -> list[VisionBlock]:
        opener, grid, column, line, closer = marks
        blocks: list[VisionBlock] = []
        image, is_open = -1, False
        for start, end in row.runs(config.image_token_id):
            check_length(row, (start, end), tokens, f"the vision tower ({tokens} a tile)")
            before = row.at(start - 1)
            last = row.at(end) == closer or (row.at(end) == grid and row.at(end + 1) == closer)
            if (before == opener) == is_open or before not in (opener, grid, column, line):
                raise row.error(
                    f"the tile at {start} does not stand in a picture with a start and an end token; build "
                    "the prompt with the model's own processor, and see that it was not truncated"
                )
            image += not is_open
            after = range(end, end + 1 + (last and row.at(end) == grid))
            delimiters = (*((start - 1,) if not is_open else ()), *after)
            blocks.append(VisionBlock(start, end, "image", square(tokens), image, delimiters))
            is_open = not last
        if is_open:
            raise row.error("the prompt ends inside an image; raise max_length or turn truncation off")
        return blocks
