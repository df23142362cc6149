"""LLaVA-NeXT: every picture at base resolution, then in tiles put together; no delimiters.

As LLaVA-OneVision's lone picture, with one newline token at the end of each row of patches (the last
column of the grid), whatever number of pictures there are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from capsight.layout.families.base import Supply, TokenRow, check_length, square
from capsight.layout.families.llava import base_tokens
from capsight.layout.families.llava_onevision import unpadded
from capsight.layout.families.rope import PlainRope
from capsight.layout.row_layout import Span, VisionBlock


class LlavaNext(PlainRope):
    """Adapter for LLaVA-NeXT: two blocks per picture."""

    model_types: tuple[str, ...] = ("llava_next",)

    def blocks(
        self, rows: Sequence[TokenRow], inputs: Mapping[str, Any], config: Any
    ) -> list[list[VisionBlock]]:
        """See `Family.blocks`."""
        sizes = Supply(inputs, "image_sizes")
        by_row: list[list[VisionBlock]] = []
        for row in rows:
            blocks: list[VisionBlock] = []
            for span in row.runs(config.image_token_id):
                blocks += _pictures(row, span, blocks[-1].image + 1 if blocks else 0, sizes, config)
            by_row.append(blocks)
        sizes.finish()
        return by_row


def _pictures(row: TokenRow, span: Span, image: int, sizes: Supply, config: Any) -> list[VisionBlock]:
    blocks: list[VisionBlock] = []
    base, start = base_tokens(config), span[0]
    side = config.vision_config.image_size // config.vision_config.patch_size
    while start < span[1]:
        size = sizes.take(row, start)
        height, width = unpadded(size, side, config)
        middle, end = start + base, start + base + height * (width + 1)
        if end > span[1]:
            check_length(row, (start, span[1]), end - start, f"an image of size {size}")
        blocks.append(VisionBlock(start, middle, "image", square(base), image))
        blocks.append(VisionBlock(middle, end, "image", (1, height, width + 1), image))
        start, image = end, image + 1
    return blocks
