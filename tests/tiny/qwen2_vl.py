"""A tiny Qwen2-VL: M-RoPE, GQA; 8 x 8 px of image make one token."""

from __future__ import annotations

from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration, Qwen2VLProcessor

from tiny.base import TinyVLM
from tiny.qwen_vl import MERGE, PATCH, qwen_processor, text_config, tiny, token_ids


def build() -> TinyVLM:
    processor = qwen_processor(Qwen2VLProcessor)
    config = Qwen2VLConfig(
        text_config=text_config(processor),
        vision_config={
            "depth": 2,
            "embed_dim": 32,
            "mlp_ratio": 2,
            "num_heads": 2,
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
            "hidden_size": 64,
        },
        **token_ids(processor),
    )
    return tiny("qwen2_vl", Qwen2VLForConditionalGeneration, config, processor)
