"""What the three tiny Qwen-VL models share: tokenizer, processor, LM sizes, a chat template."""

from __future__ import annotations

from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from tiny.base import TinyVLM, byte_tokenizer, offline, seeded
from tiny.video import PatchVideos

SPECIAL = {
    "pad": "<|endoftext|>",
    "turn": "<|im_start|>",
    "eos": "<|im_end|>",
    "start": "<|vision_start|>",
    "end": "<|vision_end|>",
    "image": "<|image_pad|>",
    "video": "<|video_pad|>",
}
PATCH, MERGE = 4, 2


def qwen_processor(processor_class: type) -> object:
    """A Qwen-VL processor of the given class with the tiny patch size and the tiny tokenizer."""
    tokenizer = byte_tokenizer(
        list(SPECIAL.values()),
        pad=SPECIAL["pad"],
        eos=SPECIAL["eos"],
        image_token=SPECIAL["image"],
        video_token=SPECIAL["video"],
    )
    image_processor = Qwen2VLImageProcessorPil(
        patch_size=PATCH, merge_size=MERGE, size={"shortest_edge": 64, "longest_edge": 128 * 128}
    )
    videos = PatchVideos(patch_size=PATCH, merge_size=MERGE)
    return offline(processor_class)(
        image_processor=image_processor, tokenizer=tokenizer, video_processor=videos
    )


def token_ids(processor: object) -> dict[str, int]:
    """The special token ids as the Qwen-VL configs name them."""
    ids = {name: processor.tokenizer.convert_tokens_to_ids(text) for name, text in SPECIAL.items()}
    return {
        "image_token_id": ids["image"],
        "video_token_id": ids["video"],
        "vision_start_token_id": ids["start"],
        "vision_end_token_id": ids["end"],
    }


def text_config(processor: object) -> dict[str, object]:
    """Three LM layers of width 64, 4 query / 2 KV heads of 16 channels, M-RoPE sections 2+3+3."""
    return {
        "vocab_size": len(processor.tokenizer),
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
        "bos_token_id": None,
        "eos_token_id": processor.tokenizer.eos_token_id,
        "pad_token_id": processor.tokenizer.pad_token_id,
    }


def tiny(name: str, model_class: type, config: object, processor: object) -> TinyVLM:
    """A 64 x 64 picture makes one block of 8 x 8 tokens; 96 x 64 makes 8 x 12."""
    return TinyVLM(
        name=name,
        model=seeded(model_class, config),
        processor=processor,
        placeholder=SPECIAL["start"] + SPECIAL["image"] + SPECIAL["end"],
        video_placeholder=SPECIAL["start"] + SPECIAL["video"] + SPECIAL["end"],
        special=SPECIAL,
        size=(64, 64),
        other_size=(96, 64),
    )
