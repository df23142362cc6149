"""GLM-4.1V to 4.6V and GLM-OCR: `<|begin_of_image|>` tokens `<|end_of_image|>`, also around each frame.

Frames are written with the *image* token, a timestamp after each; only `<|begin_of_video|>` before the
first and `<|end_of_video|>` after the last one tell them from images.
"""

from __future__ import annotations

from typing import Any

from capsight.layout.families.base import TokenRow
from capsight.layout.families.qwen3_vl import Qwen3VL
from capsight.layout.row_layout import Kind, Span


class Glm4V(Qwen3VL):
    """Adapter for GLM-4.1V, 4.5V, 4.6V and GLM-OCR: one block per image or frame."""

    model_types = ("glm4v", "glm4v_moe", "glm46v", "glm_ocr")

    def spans(self, row: TokenRow, config: Any) -> list[tuple[Kind, Span]]:
        """See `Qwen3VL.spans`."""
        starts, ends = (
            [p for p in range(row.pad_left, len(row.ids)) if row.ids[p] == token]
            for token in self.outer_pair(config)
        )

        def kind(at: int) -> Kind:
            inside = sum(p < at for p in starts) > sum(p < at for p in ends)
            return "video" if inside else "image"

        return [(kind(span[0]), span) for span in row.runs(config.image_token_id)]

    def pair(self, config: Any) -> tuple[int, int]:
        """See `Qwen3VL.pair`."""
        return config.image_start_token_id, config.image_end_token_id

    def outer_pair(self, config: Any) -> tuple[int, int]:
        """See `Qwen3VL.outer_pair`."""
        return config.video_start_token_id, config.video_end_token_id
