"""A tiny Ovis2: tiles of 64 tokens; a 64 x 64 picture is one, 128 x 64 two and the whole before them."""

from __future__ import annotations

from transformers import Ovis2Config, Ovis2ForConditionalGeneration, Ovis2Processor
from transformers.models.ovis2.image_processing_pil_ovis2 import Ovis2ImageProcessorPil

from tiny.base import TinyVLM, byte_tokenizer, offline, seeded

SPECIAL = {
    "pad": "<|endoftext|>",
    "turn": "<|im_start|>",
    "eos": "<|im_end|>",
    "picture": "<image>",
    "image": "<IMG_ATOM>",
    "start": "<IMG_START>",
    "grid": "<IMG_GRID>",
    "column": "<IMG_COL>",
    "row": "<IMG_ROW>",
    "end": "<IMG_END>",
}
TILE, PATCH, STRIDE = 64, 4, 2


def build() -> TinyVLM:
    tokenizer = byte_tokenizer(list(SPECIAL.values()), pad=SPECIAL["pad"], eos=SPECIAL["eos"])
    processor = offline(Ovis2Processor)(
        Ovis2ImageProcessorPil(size={"height": TILE, "width": TILE}, crop_to_patches=True, max_patches=2),
        tokenizer,
        image_seq_length=(TILE // PATCH // STRIDE) ** 2,
    )
    ids = {key: tokenizer.convert_tokens_to_ids(text) for key, text in SPECIAL.items()}
    config = Ovis2Config(
        text_config={
            "model_type": "qwen2",
            "vocab_size": len(tokenizer),
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "pad_token_id": ids["pad"],
            "eos_token_id": ids["eos"],
            "bos_token_id": None,
        },
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": TILE,
            "patch_size": PATCH,
            "hidden_stride": STRIDE,
            "vocab_size": 40,
            "num_visual_indicator_tokens": 5,
        },
        image_token_id=ids["image"],
        visual_indicator_token_ids=[ids[key] for key in ("start", "grid", "column", "row", "end")],
        vocab_size=len(tokenizer),
        hidden_size=64,
        tie_word_embeddings=False,
    )
    return TinyVLM(
        name="ovis2",
        model=seeded(Ovis2ForConditionalGeneration, config),
        processor=processor,
        placeholder=SPECIAL["picture"],
        special=SPECIAL,
        size=(TILE, TILE),
        other_size=(2 * TILE, TILE),
    )
