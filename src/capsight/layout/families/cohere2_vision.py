"""Command A Vision: a start token, all tiles of a picture with a line break after each, an end token.

The config does not hold these ids; they are read off the prompt and must be the same around every picture.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from capsight.layout.families.base import TokenRow, check_length, check_pictures, square
from capsight.layout.families.rope import PlainRope
from capsight.layout.row_layout import VisionBlock


class Cohere2Vision(PlainRope):
    """Adapter for Command A Vision: one square block per tile, its line break a delimiter."""

    model_types: tuple[str, ...] = ("cohere2_vision",)

    def blocks(
        self, rows: Sequence[TokenRow], inputs: Mapping[str, Any], config: Any
    ) -> list[list[VisionBlock]]:
        """See `Family.blocks`."""
        vision = config.vision_config
        tokens = (vision.image_size // vision.patch_size // config.downsample_factor) ** 2
        by_row: list[list[VisionBlock]] = []
        marks: list[set[int | None]] = [set(), set(), set()]  # start, break, end
        for row in rows:
            blocks: list[VisionBlock] = []
            spans = row.runs(config.image_token_id)
            for index, (start, end) in enumerate(spans):
                check_length(row, (start, end), tokens, f"the vision tower ({tokens} a tile)")
                first = index == 0 or spans[index - 1][1] + 1 < start
                last = index + 1 == len(spans) or end + 1 < spans[index + 1][0]
                delimiters = (*((start - 1,) if first else ()), end, *((end + 1,) if last else ()))
                for kind, place in (
                    (0, start - 1 if first else None),
                    (1, end),
                    (2, end + 1 if last else None),
                ):
                    if place is not None:
                        marks[kind].add(row.at(place))
                if any(len(ids) > 1 for ids in marks) or None in set().union(*marks):
                    raise row.error(
                        f"the tile at {start} is not followed by a line break, or its picture not enclosed "
                        "in the same pair of delimiters as others; was the prompt truncated?"
                    )
                image = blocks[-1].image + first if blocks else 0
                blocks.append(VisionBlock(start, end, "image", square(tokens), image, delimiters))
            by_row.append(blocks)
        check_pictures(inputs, sum(len(blocks) for blocks in by_row))
        return by_row
