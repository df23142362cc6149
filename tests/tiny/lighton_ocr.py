"""A tiny LightOnOCR: Pixtral's tower, patches merged 2 x 2, image tokens without breaks; Qwen3."""

from __future__ import annotations

from transformers import LightOnOcrConfig, LightOnOcrForConditionalGeneration
from transformers.models.lighton_ocr.processing_lighton_ocr import LightOnOcrProcessor
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil

from tiny.base import TinyVLM, byte_tokenizer, offline, seeded
from tiny.llava import llama

SPECIAL = {
    "pad": "<|endoftext|>",
    "turn": "<|im_start|>",
    "eos": "<|im_end|>",
    "image": "<|image_pad|>",
    "break": "<|vision_pad|>",
    "end": "<|vision_end|>",
}
PATCH, MERGE = 4, 2


def build() -> TinyVLM:
    tokenizer = byte_tokenizer(
        list(SPECIAL.values()),
        pad=SPECIAL["pad"],
        eos=SPECIAL["eos"],
        image_token=SPECIAL["image"],
        image_break_token=SPECIAL["break"],
        image_end_token=SPECIAL["end"],
    )
    side = PATCH * MERGE
    images = PixtralImageProcessorPil(size={"longest_edge": 128}, patch_size={"height": side, "width": side})
    processor = offline(LightOnOcrProcessor)(images, tokenizer, patch_size=PATCH, spatial_merge_size=MERGE)
    config = LightOnOcrConfig(
        text_config=llama(tokenizer) | {"model_type": "qwen3", "head_dim": 16},
        vision_config={
            "model_type": "pixtral",
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "head_dim": 16,
            "image_size": 128,
            "patch_size": PATCH,
        },
        spatial_merge_size=MERGE,
        image_token_id=tokenizer.convert_tokens_to_ids(SPECIAL["image"]),
        tie_word_embeddings=False,
    )
    return TinyVLM(
        name="lighton_ocr",
        model=seeded(LightOnOcrForConditionalGeneration, config),
        processor=processor,
        placeholder=SPECIAL["image"],
        special=SPECIAL,
        size=(64, 64),
        other_size=(96, 64),
    )
