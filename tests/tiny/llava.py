"""Tiny LLaVA 1.5, VipLLaVA, LLaVA-NeXT (CLIP towers, 64 tokens a tile) and Pixtral as a LLaVA."""

from __future__ import annotations

from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    LlavaProcessor,
    VipLlavaConfig,
    VipLlavaForConditionalGeneration,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from tiny.base import TinyVLM, byte_tokenizer, offline, seeded

SPECIAL = {"pad": "<pad>", "turn": "<s>", "eos": "</s>", "image": "<image>"}
TILE, PATCH = 32, 4
PINPOINTS = [[TILE * h, TILE * w] for h in (1, 2) for w in (1, 2)]
SQUARE = {"size": {"shortest_edge": TILE}, "crop_size": {"height": TILE, "width": TILE}}
CLASSES = {
    "llava": (LlavaConfig, LlavaForConditionalGeneration),
    "vipllava": (VipLlavaConfig, VipLlavaForConditionalGeneration),
    "llava_next": (LlavaNextConfig, LlavaNextForConditionalGeneration),
}


def llama(tokenizer: object) -> dict[str, object]:
    """Three LM layers of width 64, 4 query / 2 KV heads of 16 channels."""
    return {
        "model_type": "llama",
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
    }


def build(name: str, **text: object) -> TinyVLM:
    """Entries of `text` take the place of those of the language model's config."""
    tokenizer = byte_tokenizer(
        list(SPECIAL.values()), pad=SPECIAL["pad"], eos=SPECIAL["eos"], image_token=SPECIAL["image"]
    )
    tokens = {
        "patch_size": PATCH,
        "num_additional_image_tokens": 1,
        "vision_feature_select_strategy": "default",
    }
    if name == "llava_next":
        images = LlavaNextImageProcessorPil(image_grid_pinpoints=PINPOINTS, **SQUARE)
        processor = offline(LlavaNextProcessor)(image_processor=images, tokenizer=tokenizer, **tokens)
    else:
        images = CLIPImageProcessorPil(**SQUARE)
        processor = offline(LlavaProcessor)(image_processor=images, tokenizer=tokenizer, **tokens)
    config_class, model_class = CLASSES[name]
    layers = {"vision_feature_layers": [-2, -1]} if name == "vipllava" else {}
    pinpoints = {"image_grid_pinpoints": PINPOINTS} if name == "llava_next" else {}
    config = config_class(
        text_config=llama(tokenizer) | text,
        vision_config={
            "model_type": "clip_vision_model",
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "image_size": TILE,
            "patch_size": PATCH,
            "projection_dim": 32,
        },
        image_token_index=tokenizer.convert_tokens_to_ids(SPECIAL["image"]),
        **layers,
        **pinpoints,
    )
    return TinyVLM(
        name=name,
        model=seeded(model_class, config),
        processor=processor,
        placeholder=SPECIAL["image"],
        special=SPECIAL,
        size=(TILE, TILE),
        other_size=(64, 24),
        template="USER: {images}\n{text} ASSISTANT:",
    )
