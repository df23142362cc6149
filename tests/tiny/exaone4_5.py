"""A tiny EXAONE 4.5: Qwen2.5-VL's tower with grouped heads; sliding and full layers, one position a token."""

from __future__ import annotations

from transformers import Exaone4_5_Config, Exaone4_5_ForConditionalGeneration, Exaone4_5_Processor

from tiny.base import TinyVLM
from tiny.qwen_vl import MERGE, PATCH, SPECIAL, qwen_processor, text_config, tiny, token_ids


def build() -> TinyVLM:
    processor = qwen_processor(Exaone4_5_Processor)
    text = text_config(processor) | {
        "model_type": "exaone4",
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
        "sliding_window": 96,
    }
    del text["rope_parameters"]
    ids = token_ids(processor)
    config = Exaone4_5_Config(
        text_config=text,
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "num_key_value_heads": 1,
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
            "out_hidden_size": 64,
            "window_size": 4 * PATCH * MERGE,
            "fullatt_block_indexes": [1],
        },
        image_token_id=ids["image_token_id"],
        video_token_id=ids["video_token_id"],
    )
    vlm = tiny("exaone4_5", Exaone4_5_ForConditionalGeneration, config, processor)
    vlm.placeholder, vlm.video_placeholder = SPECIAL["image"], SPECIAL["video"]
    return vlm
