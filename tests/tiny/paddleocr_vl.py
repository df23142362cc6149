"""A tiny PaddleOCR-VL: M-RoPE as Qwen2-VL's, a SigLIP-like vision tower with axial RoPE."""

from __future__ import annotations

from transformers import PaddleOCRVLConfig, PaddleOCRVLForConditionalGeneration, PaddleOCRVLProcessor
from transformers.models.paddleocr_vl.image_processing_pil_paddleocr_vl import PaddleOCRVLImageProcessorPil

from tiny.base import TinyVLM, byte_tokenizer, offline, seeded
from tiny.qwen_vl import MERGE, PATCH, text_config

SPECIAL = {
    "pad": "<unk>",
    "turn": "<|begin_of_sentence|>",
    "eos": "</s>",
    "start": "<|IMAGE_START|>",
    "end": "<|IMAGE_END|>",
    "image": "<|IMAGE_PLACEHOLDER|>",
    "video": "<|video_pad|>",
}


def build() -> TinyVLM:
    tokenizer = byte_tokenizer(
        list(SPECIAL.values()), pad=SPECIAL["pad"], eos=SPECIAL["eos"], image_token=SPECIAL["image"]
    )
    size = {"shortest_edge": 64, "longest_edge": 128 * 128}
    processor = offline(PaddleOCRVLProcessor)(
        image_processor=PaddleOCRVLImageProcessorPil(patch_size=PATCH, merge_size=MERGE, size=size),
        tokenizer=tokenizer,
    )
    ids = {key: tokenizer.convert_tokens_to_ids(text) for key, text in SPECIAL.items()}
    config = PaddleOCRVLConfig(
        text_config=text_config(processor) | {"head_dim": 16},
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 64,
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
        },
        image_token_id=ids["image"],
        video_token_id=ids["video"],
        vision_start_token_id=ids["start"],
        vision_end_token_id=ids["end"],
    )
    return TinyVLM(
        name="paddleocr_vl",
        model=seeded(PaddleOCRVLForConditionalGeneration, config),
        processor=processor,
        placeholder=SPECIAL["start"] + SPECIAL["image"] + SPECIAL["end"],
        special=SPECIAL,
        size=(64, 64),
        other_size=(96, 64),
        template="<|begin_of_sentence|>User: {images}{text}\nAssistant: ",
    )
