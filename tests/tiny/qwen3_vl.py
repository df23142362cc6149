"""A tiny Qwen3-VL: interleaved M-RoPE, q/k norm, deepstack features in the first two LM layers."""

from __future__ import annotations

from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration, Qwen3VLProcessor

from tiny.base import TinyVLM
from tiny.qwen_vl import MERGE, PATCH, qwen_processor, text_config, tiny, token_ids


def build() -> TinyVLM:
    processor = qwen_processor(Qwen3VLProcessor)
    text = text_config(processor) | {"head_dim": 16}
    text["rope_parameters"] = {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "mrope_section": [4, 2, 2],
        "mrope_interleaved": True,
    }
    config = Qwen3VLConfig(
        text_config=text,
        vision_config={
            "depth": 3,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
            "out_hidden_size": 64,
            "num_position_embeddings": 16 * 16,
            "deepstack_visual_indexes": [0, 1],
        },
        **token_ids(processor),
    )
    return tiny("qwen3_vl", Qwen3VLForConditionalGeneration, config, processor)
