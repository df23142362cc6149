"""A tiny Muse Glimmer: sliding layers with RoPE, full ones without; windows in the vision tower."""

from __future__ import annotations

from transformers import MuseGlimmerConfig, MuseGlimmerForConditionalGeneration, MuseGlimmerProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from tiny.base import TinyVLM, byte_tokenizer, offline, seeded
from tiny.qwen_vl import MERGE, PATCH
from tiny.video import PatchVideos

SPECIAL = {
    "pad": "<|endoftext|>",
    "turn": "<|im_start|>",
    "eos": "<|im_end|>",
    "start": "<|image_start|>",
    "end": "<|image_end|>",
    "image": "<|patch|>",
    "video": "<|video|>",
    "frame": "<|vid_frame_separator|>",
    "video_start": "<|vid_start|>",
    "video_end": "<|vid_end|>",
}


def build() -> TinyVLM:
    """As Qwen-VL: a 64 x 64 picture makes 8 x 8 tokens, 96 x 64 makes 8 x 12."""
    tokenizer = byte_tokenizer(list(SPECIAL.values()), pad=SPECIAL["pad"], eos=SPECIAL["eos"])
    images = Qwen2VLImageProcessorPil(
        patch_size=PATCH, merge_size=MERGE, size={"shortest_edge": 64, "longest_edge": 128 * 128}
    )
    videos = PatchVideos(patch_size=PATCH, merge_size=MERGE)
    videos.merge_size, videos.frame_timestamp_format = MERGE, "{timestamp:.1f}s"
    processor = offline(MuseGlimmerProcessor)(images, videos, tokenizer)
    ids = {key: tokenizer.convert_tokens_to_ids(text) for key, text in SPECIAL.items()}
    config = MuseGlimmerConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "sliding_window": 96,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "layer_rope_theta": [10000.0, 0, 10000.0, 0],
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            "pad_token_id": ids["pad"],
            "eos_token_id": ids["eos"],
            "bos_token_id": None,
        },
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "patch_size": PATCH,
            "merge_size": MERGE,
            "pos_emb_height": 8,
            "pos_emb_width": 8,
            "layer_types": ["window_attention", "full_attention"],
            "rope_parameters": {"rope_type": "axial", "rope_theta": 10000.0},
        },
        image_token_id=ids["image"],
        video_token_id=ids["video"],
        out_hidden_size=32 * MERGE**2,
        projector_hidden_size=48,
    )
    return TinyVLM(
        name="muse_glimmer",
        model=seeded(MuseGlimmerForConditionalGeneration, config),
        processor=processor,
        placeholder=SPECIAL["image"],
        video_placeholder=SPECIAL["video"],
        special=SPECIAL,
        size=(64, 64),
        other_size=(96, 64),
    )
