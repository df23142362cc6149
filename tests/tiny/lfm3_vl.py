"""A tiny LFM3-VL: short convolutions, a sliding and a full-attention layer; images written as Qwen3-VL's."""

from __future__ import annotations

from transformers import Lfm3VlConfig, Lfm3VlForConditionalGeneration, Lfm3VlProcessor

from tiny.base import TinyVLM
from tiny.qwen_vl import MERGE, PATCH, qwen_processor, text_config, tiny, token_ids


def build() -> TinyVLM:
    processor = qwen_processor(Lfm3VlProcessor)
    text = text_config(processor) | {
        "model_type": "lfm3",
        "num_hidden_layers": 4,
        "layer_types": ["conv", "sliding_attention", "conv", "full_attention"],
        "sliding_window": 96,
        "head_dim": 16,
    }
    del text["rope_parameters"]
    config = Lfm3VlConfig(
        text_config=text,
        vision_config={
            "num_hidden_layers": 3,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
        },
        projector_hidden_size=64,
        **token_ids(processor),
    )
    return tiny("lfm3_vl", Lfm3VlForConditionalGeneration, config, processor)
