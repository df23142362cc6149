"""Mistral 3 and Pixtral: rows of `[IMG]` with an `[IMG_BREAK]` after each; after the last one, `[IMG_END]`.

A row is shorter than a capsule, so the breaks are the last column of the block's grid, as the newline
tokens of LLaVA's tiles are. The config does not hold their ids; they are read off the prompt: whatever
stands at the ends of the rows must be one and the same token there and another one at the end.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from capsight.layout.families.base import Supply, TokenRow
from capsight.layout.families.rope import PlainRope
from capsight.layout.row_layout import Span, VisionBlock


class Mistral3(PlainRope):
    """Adapter for Mistral Small 3.x and Ministral 3: one block per picture, breaks and end included."""

    model_types: tuple[str, ...] = ("mistral3",)

    def blocks(
        self, rows: Sequence[TokenRow], inputs: Mapping[str, Any], config: Any
    ) -> list[list[VisionBlock]]:
        """See `Family.blocks`."""
        patch = config.vision_config.patch_size * config.spatial_merge_size
        return rows_of_pixtral(rows, inputs, patch, config)


def rows_of_pixtral(
    rows: Sequence[TokenRow], inputs: Mapping[str, Any], patch: int, config: Any
) -> list[list[VisionBlock]]:
    """The vision blocks of every row.

    Args:
        rows: the batch.
        inputs: what the processor returned; `image_sizes` (images, 2) holds heights and widths.
        patch: pixels along a token.
        config: the model's.

    Raises:
        LayoutError: the tokens are not those of pictures of these sizes.
    """
    sizes = Supply(inputs, "image_sizes")
    by_row: list[list[VisionBlock]] = []
    breaks: set[int] = set()
    ends: set[int] = set()
    for row in rows:
        blocks: list[VisionBlock] = []
        spans = row.runs(config.image_token_id)
        while spans:
            height, width = (size // patch for size in sizes.take(row, spans[0][0]))
            lines, spans = spans[:height], spans[height:]
            block = _picture(row, lines, height, width, len(blocks))
            breaks |= {row.ids[end] for _, end in lines[:-1]}
            ends.add(row.ids[block.end - 1])
            if len(breaks) > 1 or len(ends) > 1 or breaks & ends:
                raise row.error(
                    "rows of an image end in one token and images in another one, everywhere; build the "
                    "prompt with the model's own processor"
                )
            blocks.append(block)
        by_row.append(blocks)
    sizes.finish()
    return by_row


def _picture(row: TokenRow, lines: list[Span], height: int, width: int, image: int) -> VisionBlock:
    start = lines[0][0]
    expected = [(at, at + width) for at in range(start, start + height * (width + 1), width + 1)]
    if lines != expected:
        at, grid = lines[0][0], f"{height} rows of {width} vision tokens"
        raise row.error(
            f"the image at {at} calls for {grid} with a break after each, but the prompt has others; was it "
            "truncated, or do images and prompt not belong together?"
        )
    end = start + height * (width + 1)
    if end > len(row.ids):
        raise row.error(
            f"the prompt ends with the vision tokens at {lines[-1][0]}, without the end-of-image token; "
            "it was truncated: raise max_length or turn truncation off"
        )
    return VisionBlock(start, end, "image", (1, height, width + 1), image)
