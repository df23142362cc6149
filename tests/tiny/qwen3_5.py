"""Tiny Qwen3.5, dense and mixture of experts: gated delta nets, every other layer full attention."""

from __future__ import annotations

from transformers import (
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3_5MoeConfig,
    Qwen3_5MoeForConditionalGeneration,
    Qwen3VLProcessor,
)

from tiny.base import TinyVLM
from tiny.qwen_vl import MERGE, PATCH, qwen_processor, text_config, tiny, token_ids

CLASSES = {
    "qwen3_5": (Qwen3_5Config, Qwen3_5ForConditionalGeneration),
    "qwen3_5_moe": (Qwen3_5MoeConfig, Qwen3_5MoeForConditionalGeneration),
}


def hybrid_text(processor: object) -> dict[str, object]:
    """Four LM layers of width 64: two gated delta nets, two of full attention."""
    text = text_config(processor) | {
        "num_hidden_layers": 4,
        "head_dim": 16,
        "layer_types": ["linear_attention", "full_attention"] * 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
    }
    text["rope_parameters"] = {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.5,
        "mrope_section": [2, 1, 1],
        "mrope_interleaved": True,
    }
    return text


def build(name: str) -> TinyVLM:
    processor = qwen_processor(Qwen3VLProcessor)
    text = hybrid_text(processor)
    if name == "qwen3_5_moe":
        text |= {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 32,
        }
    config_class, model_class = CLASSES[name]
    config = config_class(
        text_config=text,
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
            "out_hidden_size": 64,
            "num_position_embeddings": 16 * 16,
        },
        **token_ids(processor),
    )
    return tiny(name, model_class, config, processor)
