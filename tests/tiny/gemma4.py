"""Tiny Gemma 4 (as 26B: experts, other heads in full layers, two-way images in sliding ones) and Unified."""

from __future__ import annotations

from transformers import (
    Gemma4Config,
    Gemma4ForConditionalGeneration,
    Gemma4Processor,
    Gemma4UnifiedConfig,
    Gemma4UnifiedForConditionalGeneration,
)
from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil

from tiny.base import TinyVLM, byte_tokenizer, offline, seeded
from tiny.video import PicturedVideos

SPECIAL = {
    "pad": "<pad>",
    "bos": "<bos>",
    "turn": "<|turn>",
    "eos": "<turn|>",
    "start": "<|image>",
    "end": "<image|>",
    "image": "<|image|>",
    "audio_start": "<|audio>",
    "audio_end": "<audio|>",
    "audio": "<|audio|>",
    "video": "<|video|>",
}
PATCH, POOL = 4, 3
CLASSES = {
    "gemma4": (Gemma4Config, Gemma4ForConditionalGeneration),
    "gemma4_unified": (Gemma4UnifiedConfig, Gemma4UnifiedForConditionalGeneration),
}


def build(name: str) -> TinyVLM:
    """A 96 x 96 picture makes 11 x 11 tokens of 12 x 12 pixels; 144 x 96 makes 9 x 14."""
    tokenizer = byte_tokenizer(
        list(SPECIAL.values()),
        pad=SPECIAL["pad"],
        eos=SPECIAL["eos"],
        bos=SPECIAL["bos"],
        image_token=SPECIAL["image"],
        boi_token=SPECIAL["start"],
        eoi_token=SPECIAL["end"],
        audio_token=SPECIAL["audio"],
        boa_token=SPECIAL["audio_start"],
        eoa_token=SPECIAL["audio_end"],
    )
    # The unified model takes patches that are merged already; its own image processor needs torchvision.
    patch, pool = (PATCH, POOL) if name == "gemma4" else (PATCH * POOL, 1)
    images = Gemma4ImageProcessorPil(patch_size=patch, pooling_kernel_size=pool, max_soft_tokens=140)
    videos = PicturedVideos(
        images,
        {
            "pixel_values": "pixel_values_videos",
            "image_position_ids": "video_position_ids",
            "num_soft_tokens_per_image": "num_soft_tokens_per_video",
        },
        timed=True,
        max_soft_tokens=70,
    )
    processor = offline(Gemma4Processor)(
        feature_extractor=None, image_processor=images, tokenizer=tokenizer, video_processor=videos
    )
    ids = {key: tokenizer.convert_tokens_to_ids(text) for key, text in SPECIAL.items()}
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "global_head_dim": 32,
        "num_global_key_value_heads": 1,
        "sliding_window": 160,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "use_bidirectional_attention": "vision",
        "pad_token_id": ids["pad"],
        "eos_token_id": ids["eos"],
        "bos_token_id": ids["bos"],
    }
    if name == "gemma4":
        experts = {
            "enable_moe_block": True,
            "num_experts": 4,
            "top_k_experts": 2,
            "moe_intermediate_size": 32,
        }
        text |= experts | {"attention_k_eq_v": True, "hidden_size_per_layer_input": 0}
        text["vocab_size_per_layer_input"] = len(tokenizer)
        vision = {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 16,
        }
    else:
        vision = {"mm_embed_dim": 32, "mm_posemb_size": 32, "output_proj_dims": 32}
    config_class, model_class = CLASSES[name]
    config = config_class(
        text_config=text,
        vision_config=vision | {"patch_size": PATCH, "pooling_kernel_size": POOL},
        audio_config=None,
        boi_token_id=ids["start"],
        eoi_token_id=ids["end"],
        image_token_id=ids["image"],
        video_token_id=ids["video"],
        boa_token_id=ids["audio_start"],
        audio_token_id=ids["audio"],
    )
    return TinyVLM(
        name=name,
        model=seeded(model_class, config, embedding_std=0.1),
        processor=processor,
        placeholder=SPECIAL["image"],
        video_placeholder=SPECIAL["video"],
        special=SPECIAL,
        size=(96, 96),
        other_size=(144, 96),
        template="<bos><|turn>user\n{images}{text}<turn|>\n<|turn>model\n",
    )
