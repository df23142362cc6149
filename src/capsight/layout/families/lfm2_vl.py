"""LFM2-VL: `<|image_start|>`, each tile after its tag, the thumbnail after its own, `<|image_end|>`.

A picture that is one tile has no tag. The config holds neither tags nor delimiters, so they are read off the
prompt: what follows a row's last tile is the end token, and what stands before a picture the start token,
one and the same everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from capsight.layout.families.base import Supply, TokenRow, check_length
from capsight.layout.families.rope import PlainRope
from capsight.layout.row_layout import Grid, Span, VisionBlock


class LFM2VL(PlainRope):
    """Adapter for LFM2-VL: one block per tile, the thumbnail last."""

    model_types: tuple[str, ...] = ("lfm2_vl",)

    def blocks(
        self, rows: Sequence[TokenRow], inputs: Mapping[str, Any], config: Any
    ) -> list[list[VisionBlock]]:
        """See `Family.blocks`."""
        shapes = Supply(inputs, "spatial_shapes")
        by_row: list[list[VisionBlock]] = []
        marks: set[tuple[int | None, int | None]] = set()
        for row in rows:
            blocks: list[VisionBlock] = []
            spans = row.runs(config.image_token_id)
            closer = row.at(spans[-1][1]) if spans else None
            image, first, tags = 0, True, {closer}
            for span in spans:
                grid = _merged(shapes.take(row, span[0]), config.downsample_factor)
                check_length(row, span, grid[1] * grid[2], f"spatial_shapes (merged grid {grid})")
                last = row.at(span[1]) == closer
                opener = span[0] - (1 if last or not first else 2)  # a tag stands before a tile of several
                if first:
                    tags = {closer}
                    marks.add((row.at(opener), closer))
                    sound = opener >= (blocks[-1].reach if blocks else row.pad_left)
                else:
                    sound = opener == blocks[-1].end
                _check(row, span, sound and row.at(span[0] - 1) not in tags, marks)
                tags.add(row.at(span[0] - 1))
                delimiters = (*range(opener, span[0]), *((span[1],) if last else ()))
                blocks.append(VisionBlock(*span, "image", grid, image, delimiters))
                image, first = image + last, last
            by_row.append(blocks)
        shapes.finish()
        return by_row


def _check(row: TokenRow, span: Span, sound: bool, marks: set[tuple[int | None, int | None]]) -> None:
    if span[1] == len(row.ids):
        raise row.error(
            f"the prompt ends with the vision tokens at {span[0]}, without the end-of-image token; it was "
            "truncated: raise max_length or turn truncation off"
        )
    if not sound or len(marks) > 1 or None in next(iter(marks)):
        raise row.error(
            f"the tile at {span[0]} has no tag of its own, or its picture is not enclosed in the same pair "
            "of delimiters as others; build the prompt with the model's own processor"
        )


def _merged(shape: tuple[int, ...], factor: int) -> Grid:
    height, width = (-(-side // factor) for side in shape)
    return 1, height, width
