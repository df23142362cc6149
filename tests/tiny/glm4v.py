"""Tiny GLM-4.1V, 4.5V, 4.6V and GLM-OCR: one prompt format, partial or whole M-RoPE, dense or experts."""

from __future__ import annotations

from transformers import (
    Glm4vConfig,
    Glm4vForConditionalGeneration,
    Glm4vMoeConfig,
    Glm4vMoeForConditionalGeneration,
    Glm4vProcessor,
    Glm46VConfig,
    Glm46VForConditionalGeneration,
    Glm46VProcessor,
    GlmOcrConfig,
    GlmOcrForConditionalGeneration,
)
from transformers.models.glm4v.image_processing_pil_glm4v import Glm4vImageProcessorPil
from transformers.models.glm46v.image_processing_pil_glm46v import Glm46VImageProcessorPil

from tiny.base import TinyVLM, byte_tokenizer, offline, seeded
from tiny.qwen_vl import MERGE, PATCH, text_config
from tiny.video import PatchVideos

SPECIAL = {
    "pad": "<|endoftext|>",
    "turn": "<|user|>",
    "eos": "<|assistant|>",
    "start": "<|begin_of_image|>",
    "end": "<|end_of_image|>",
    "video_start": "<|begin_of_video|>",
    "video_end": "<|end_of_video|>",
    "image": "<|image|>",
    "video": "<|video|>",
}
CLASSES = {
    "glm4v": (Glm4vConfig, Glm4vForConditionalGeneration, Glm4vProcessor, Glm4vImageProcessorPil),
    "glm4v_moe": (Glm4vMoeConfig, Glm4vMoeForConditionalGeneration, Glm4vProcessor, Glm4vImageProcessorPil),
    "glm46v": (Glm46VConfig, Glm46VForConditionalGeneration, Glm46VProcessor, Glm46VImageProcessorPil),
    "glm_ocr": (GlmOcrConfig, GlmOcrForConditionalGeneration, Glm46VProcessor, Glm46VImageProcessorPil),
}


def build(name: str) -> TinyVLM:
    config_class, model_class, processor_class, image_class = CLASSES[name]
    tokenizer = byte_tokenizer(
        list(SPECIAL.values()),
        pad=SPECIAL["pad"],
        eos=SPECIAL["eos"],
        image_token=SPECIAL["image"],
        video_token=SPECIAL["video"],
    )
    size = {"shortest_edge": 64, "longest_edge": 2 * 128 * 128}
    processor = offline(processor_class)(
        image_processor=image_class(patch_size=PATCH, merge_size=MERGE, size=size),
        tokenizer=tokenizer,
        video_processor=PatchVideos(PATCH, MERGE),
    )
    ids = {key: tokenizer.convert_tokens_to_ids(text) for key, text in SPECIAL.items()}
    text = text_config(processor) | {"head_dim": 16}
    half = {"partial_rotary_factor": 0.5, "mrope_section": [1, 1, 2]}  # of the channels are turned
    text["rope_parameters"] = text["rope_parameters"] | (half if name != "glm_ocr" else {})
    if name == "glm4v_moe":
        experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
        text |= experts | {"first_k_dense_replace": 1}
    config = config_class(
        text_config=text,
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "image_size": 64,
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
            "out_hidden_size": 64,
        },
        image_token_id=ids["image"],
        video_token_id=ids["video"],
        image_start_token_id=ids["start"],
        image_end_token_id=ids["end"],
        video_start_token_id=ids["video_start"],
        video_end_token_id=ids["video_end"],
    )
    return TinyVLM(
        name=name,
        model=seeded(model_class, config),
        processor=processor,
        placeholder=SPECIAL["start"] + SPECIAL["image"] + SPECIAL["end"],
        video_placeholder=SPECIAL["video_start"] + SPECIAL["video"] + SPECIAL["video_end"],
        special=SPECIAL,
        size=(64, 64),
        other_size=(96, 64),
        template="<|user|>\n{images}{text}<|assistant|>\n",
    )
