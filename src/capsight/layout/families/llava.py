"""LLaVA 1.5 and its like: one square of image tokens a picture, without delimiters.

Neighbouring pictures run together and are cut by counting. A LLaVA with Pixtral's vision tower
(Pixtral 12B) writes its pictures as Mistral 3 does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from capsight.layout.families.base import TokenRow, check_length, check_pictures, square
from capsight.layout.families.mistral3 import rows_of_pixtral
from capsight.layout.families.rope import PlainRope
from capsight.layout.row_layout import VisionBlock


class Llava(PlainRope):
    """Adapter for LLaVA, VipLLaVA and DeepSeek-VL: one block per picture."""

    model_types: tuple[str, ...] = ("llava", "vipllava", "deepseek_vl")

    def blocks(
        self, rows: Sequence[TokenRow], inputs: Mapping[str, Any], config: Any
    ) -> list[list[VisionBlock]]:
        """See `Family.blocks`."""
        if config.vision_config.model_type == "pixtral":
            return rows_of_pixtral(rows, inputs, config.vision_config.patch_size, config)
        tokens = base_tokens(config)
        by_row: list[list[VisionBlock]] = []
        for row in rows:
            blocks: list[VisionBlock] = []
            for span in row.runs(config.image_token_id):
                expected = max(round((span[1] - span[0]) / tokens), 1) * tokens
                check_length(row, span, expected, f"the vision tower ({tokens} a picture)")
                for start in range(*span, tokens):
                    end = start + tokens
                    blocks.append(VisionBlock(start, end, "image", square(tokens), len(blocks)))
            by_row.append(blocks)
        check_pictures(inputs, sum(len(blocks) for blocks in by_row))
        return by_row


def base_tokens(config: Any) -> int:
    """Tokens of one picture at the vision tower's own resolution.

    The strategy "default" drops the first feature, which in CLIP stands for the whole picture.
    """
    vision = config.vision_config
    features = (vision.image_size // vision.patch_size) ** 2 + (vision.model_type == "clip_vision_model")
    otherwise = "full" if config.model_type == "deepseek_vl" else "default"
    strategy = getattr(config, "vision_feature_select_strategy", otherwise)
    return int(features) - (strategy == "default")
