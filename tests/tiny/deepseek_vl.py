"""A tiny DeepSeek-VL: 64 tokens a picture, whatever its size, without delimiters."""

from __future__ import annotations

from transformers import DeepseekVLConfig, DeepseekVLForConditionalGeneration, DeepseekVLProcessor
from transformers.models.deepseek_vl.image_processing_pil_deepseek_vl import DeepseekVLImageProcessorPil

from tiny.base import TinyVLM, byte_tokenizer, offline, seeded
from tiny.llava import llama

SPECIAL = {"pad": "<pad>", "turn": "<|im_start|>", "eos": "<|im_end|>", "image": "<image_placeholder>"}
SIDE, PATCH = 32, 4


def build() -> TinyVLM:
    tokenizer = byte_tokenizer(
        list(SPECIAL.values()), pad=SPECIAL["pad"], eos=SPECIAL["eos"], image_token=SPECIAL["image"]
    )
    processor = offline(DeepseekVLProcessor)(
        DeepseekVLImageProcessorPil(size={"height": SIDE, "width": SIDE}),
        tokenizer,
        num_image_tokens=(SIDE // PATCH) ** 2,
    )
    config = DeepseekVLConfig(
        text_config=llama(tokenizer),
        vision_config={
            "model_type": "siglip_vision_model",
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": SIDE,
            "patch_size": PATCH,
            "vision_use_head": False,
        },
        image_token_id=tokenizer.convert_tokens_to_ids(SPECIAL["image"]),
        tie_word_embeddings=False,
    )
    return TinyVLM(
        name="deepseek_vl",
        model=seeded(DeepseekVLForConditionalGeneration, config),
        processor=processor,
        placeholder=SPECIAL["image"],
        special=SPECIAL,
        size=(64, 64),
        other_size=(96, 64),
    )
