"""A tiny Command A Vision: tiles of 64 tokens with line breaks; full layers have no RoPE."""

from __future__ import annotations

from transformers import Cohere2VisionConfig, Cohere2VisionForConditionalGeneration
from transformers.models.cohere2_vision.processing_cohere2_vision import Cohere2VisionProcessor

from tiny.base import TinyVLM, byte_tokenizer, offline, seeded
from tiny.tiles import StackedTiles

SPECIAL = {
    "pad": "<PAD>",
    "turn": "<|im_start|>",
    "eos": "<|im_end|>",
    "start": "<|START_OF_IMG|>",
    "end": "<|END_OF_IMG|>",
    "image": "<|IMG_PATCH|>",
    "line": "<|IMG_LINE_BREAK|>",
}
TILE, PATCH, FACTOR = 64, 4, 2


def build() -> TinyVLM:
    tokenizer = byte_tokenizer(
        list(SPECIAL.values()),
        pad=SPECIAL["pad"],
        eos=SPECIAL["eos"],
        image_token=SPECIAL["image"],
        boi_token=SPECIAL["start"],
        eoi_token=SPECIAL["end"],
        img_line_break_token=SPECIAL["line"],
    )
    processor = offline(Cohere2VisionProcessor)(StackedTiles(TILE, TILE // PATCH // FACTOR), tokenizer)
    config = Cohere2VisionConfig(
        text_config={
            "model_type": "cohere2",
            "vocab_size": len(tokenizer),
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "layer_types": ["sliding_attention", "full_attention", "full_attention"],
            "sliding_window": 96,
            "logit_scale": 1.0,
            "pad_token_id": tokenizer.pad_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "bos_token_id": None,
        },
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": TILE,
            "patch_size": PATCH,
            "vision_use_head": False,
        },
        downsample_factor=FACTOR,
        alignment_intermediate_size=64,
        image_token_id=tokenizer.convert_tokens_to_ids(SPECIAL["image"]),
    )
    return TinyVLM(
        name="cohere2_vision",
        model=seeded(Cohere2VisionForConditionalGeneration, config),
        processor=processor,
        placeholder=SPECIAL["image"],
        special=SPECIAL,
        size=(TILE, TILE),
        other_size=(2 * TILE, TILE),
    )
