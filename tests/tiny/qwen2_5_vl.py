"""A tiny Qwen2.5-VL: M-RoPE, GQA, windowed vision tower; 8 x 8 px of image make one token."""

from __future__ import annotations

from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor

from tiny.base import TinyVLM
from tiny.qwen_vl import MERGE, PATCH, qwen_processor, text_config, tiny, token_ids


def build() -> TinyVLM:
    processor = qwen_processor(Qwen2_5_VLProcessor)
    config = Qwen2_5_VLConfig(
        text_config=text_config(processor),
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
            "window_size": 4 * PATCH * MERGE,
            "fullatt_block_indexes": [1],
            "out_hidden_size": 64,
        },
        **token_ids(processor),
    )
    return tiny("qwen2_5_vl", Qwen2_5_VLForConditionalGeneration, config, processor)
