"""Gemma 3: `<start_of_image>` a fixed number of tokens `<end_of_image>`, whatever the image's size.

The processor writes pan-and-scan crops as further images with words between them; nothing in the
tokens tells a crop from an image, so each crop counts as an image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from capsight.layout.families.base import (
    TokenRow,
    check_length,
    check_pictures,
    enclosing,
    square,
)
from capsight.layout.families.rope import PlainRope
from capsight.layout.row_layout import VisionBlock


class Gemma3(PlainRope):
    """Adapter for Gemma 3: one square block per image or crop."""

    model_types: tuple[str, ...] = ("gemma3",)

    def blocks(
        self, rows: Sequence[TokenRow], inputs: Mapping[str, Any], config: Any
    ) -> list[list[VisionBlock]]:
        """See `Family.blocks`."""
        by_row = [self._row(row, config) for row in rows]
        check_pictures(inputs, sum(len(blocks) for blocks in by_row))
        return by_row

    def _row(self, row: TokenRow, config: Any) -> list[VisionBlock]:
        blocks: list[VisionBlock] = []
        for span in row.runs(config.image_token_id):
            check_length(row, span, config.mm_tokens_per_image, "config.mm_tokens_per_image")
            delimiters = enclosing(row, span, config.boi_token_id, config.eoi_token_id)
            grid = square(config.mm_tokens_per_image)
            blocks.append(VisionBlock(*span, "image", grid, len(blocks), delimiters))
        return blocks
