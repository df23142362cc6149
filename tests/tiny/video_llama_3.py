"""A tiny VideoLLaMA 3 for pictures: one token a patch, neighbouring pictures without anything between."""

from __future__ import annotations

from types import SimpleNamespace

from transformers import VideoLlama3Config, VideoLlama3ForConditionalGeneration
from transformers.models.video_llama_3.image_processing_pil_video_llama_3 import VideoLlama3ImageProcessorPil
from transformers.models.video_llama_3.processing_video_llama_3 import VideoLlama3Processor

from tiny.base import TinyVLM, byte_tokenizer, offline, seeded
from tiny.llava import llama

SPECIAL = {
    "pad": "<|endoftext|>",
    "turn": "<|im_start|>",
    "eos": "<|im_end|>",
    "image": "<image>",
    "video": "<video>",
}
PATCH, MERGE = 8, 1


def build() -> TinyVLM:
    tokenizer = byte_tokenizer(
        list(SPECIAL.values()),
        pad=SPECIAL["pad"],
        eos=SPECIAL["eos"],
        image_token=SPECIAL["image"],
        video_token=SPECIAL["video"],
    )
    images = VideoLlama3ImageProcessorPil(
        patch_size=PATCH, merge_size=MERGE, size={"shortest_edge": 64, "longest_edge": 128 * 128}
    )
    processor = offline(VideoLlama3Processor)(
        image_processor=images, tokenizer=tokenizer, video_processor=SimpleNamespace(model_input_names=[])
    )
    config = VideoLlama3Config(
        text_config=llama(tokenizer) | {"model_type": "qwen2"},
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "patch_size": PATCH,
        },
        image_token_id=tokenizer.convert_tokens_to_ids(SPECIAL["image"]),
        video_token_id=tokenizer.convert_tokens_to_ids(SPECIAL["video"]),
    )
    return TinyVLM(
        name="video_llama_3",
        model=seeded(VideoLlama3ForConditionalGeneration, config),
        processor=processor,
        placeholder=SPECIAL["image"],
        special=SPECIAL,
        size=(64, 64),
        other_size=(96, 64),
    )
