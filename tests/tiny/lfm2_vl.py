"""A tiny LFM2-VL: short convolutions beside full attention; a 64 x 64 picture is one tile, 128 x 64 three."""

from __future__ import annotations

from transformers import Lfm2VlConfig, Lfm2VlForConditionalGeneration
from transformers.models.lfm2_vl.processing_lfm2_vl import Lfm2VlProcessor

from tiny.base import TinyVLM, byte_tokenizer, offline, seeded
from tiny.tiles import PatchedTiles

SPECIAL = {
    "pad": "<|pad|>",
    "turn": "<|im_start|>",
    "eos": "<|im_end|>",
    "start": "<|image_start|>",
    "end": "<|image_end|>",
    "image": "<image>",
    "thumbnail": "<|img_thumbnail|>",
}
TAGS = ["<|img_row_1_col_1|>", "<|img_row_1_col_2|>"]
TILE, PATCH, FACTOR = 64, 4, 2


def build() -> TinyVLM:
    tokenizer = byte_tokenizer(
        [*SPECIAL.values(), *TAGS],
        pad=SPECIAL["pad"],
        eos=SPECIAL["eos"],
        image_token=SPECIAL["image"],
        image_start_token=SPECIAL["start"],
        image_end_token=SPECIAL["end"],
        image_thumbnail_token=SPECIAL["thumbnail"],
    )
    processor = offline(Lfm2VlProcessor)(PatchedTiles(TILE, PATCH, FACTOR), tokenizer)
    config = Lfm2VlConfig(
        text_config={
            "model_type": "lfm2",
            "vocab_size": len(tokenizer),
            "hidden_size": 64,
            "intermediate_size": 96,
            "block_auto_adjust_ff_dim": False,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "layer_types": ["conv", "full_attention"] * 2,
            "conv_L_cache": 3,
            "pad_token_id": tokenizer.pad_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "bos_token_id": None,
        },
        vision_config={
            "model_type": "siglip2_vision_model",
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_patches": (TILE // PATCH) ** 2,
            "patch_size": PATCH,
            "vision_use_head": False,
        },
        downsample_factor=FACTOR,
        projector_hidden_size=64,
        image_token_id=tokenizer.convert_tokens_to_ids(SPECIAL["image"]),
    )
    return TinyVLM(
        name="lfm2_vl",
        model=seeded(Lfm2VlForConditionalGeneration, config),
        processor=processor,
        placeholder=SPECIAL["image"],
        special=SPECIAL,
        size=(TILE, TILE),
        other_size=(2 * TILE, TILE),
    )
