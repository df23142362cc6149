"""A tiny LLaVA-OneVision: a lone image is 64 base tokens and its tiles, an image among others 64 + 1."""

from __future__ import annotations

from transformers import (
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionProcessor,
)
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
    LlavaOnevisionImageProcessorPil,
)

from tiny.base import TinyVLM, byte_tokenizer, offline, seeded
from tiny.video import FrameVideos

SPECIAL = {
    "pad": "<|endoftext|>",
    "turn": "<|im_start|>",
    "eos": "<|im_end|>",
    "image": "<image>",
    "video": "<video>",
}
TILE, PATCH = 32, 4
PINPOINTS = [[TILE * h, TILE * w] for h in (1, 2) for w in (1, 2)]


def build() -> TinyVLM:
    tokenizer = byte_tokenizer(
        list(SPECIAL.values()),
        pad=SPECIAL["pad"],
        eos=SPECIAL["eos"],
        image_token=SPECIAL["image"],
        video_token=SPECIAL["video"],
    )
    images = LlavaOnevisionImageProcessorPil(
        size={"height": TILE, "width": TILE}, image_grid_pinpoints=PINPOINTS
    )
    processor = offline(LlavaOnevisionProcessor)(
        image_processor=images,
        tokenizer=tokenizer,
        video_processor=FrameVideos("pixel_values_videos", TILE),
        num_image_tokens=(TILE // PATCH) ** 2,
        vision_feature_select_strategy="full",
    )
    config = LlavaOnevisionConfig(
        text_config={
            "model_type": "qwen2",
            "vocab_size": len(tokenizer),
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "pad_token_id": tokenizer.pad_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "bos_token_id": None,
        },
        vision_config={
            "model_type": "siglip_vision_model",
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": TILE,
            "patch_size": PATCH,
            "vision_use_head": False,
        },
        image_grid_pinpoints=PINPOINTS,
        image_token_index=tokenizer.convert_tokens_to_ids(SPECIAL["image"]),
        video_token_index=tokenizer.convert_tokens_to_ids(SPECIAL["video"]),
    )
    return TinyVLM(
        name="llava_onevision",
        model=seeded(LlavaOnevisionForConditionalGeneration, config),
        processor=processor,
        placeholder=SPECIAL["image"],
        video_placeholder=SPECIAL["video"],
        special=SPECIAL,
        size=(32, 32),
        other_size=(64, 24),
        template="<|im_start|>user {images}\n{text}<|im_end|><|im_start|>assistant\n",
    )
