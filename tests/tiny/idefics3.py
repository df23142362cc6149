"""A tiny Idefics3: tiles of 64 tokens whose tags (`<row_1_col_2>`) are spelled in several tokens."""

from __future__ import annotations

from transformers import Idefics3Config, Idefics3ForConditionalGeneration, Idefics3Processor
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

from tiny.base import TinyVLM, byte_tokenizer, offline, seeded

SPECIAL = {
    "pad": "<|endoftext|>",
    "turn": "<|begin_of_text|>",
    "eos": "<end_of_utterance>",
    "fake": "<fake_token_around_image>",
    "image": "<image>",
}
TILE, PATCH, SCALE = 64, 4, 2
PER_TILE = (TILE // PATCH // SCALE) ** 2
TEMPLATE = "<|begin_of_text|>User:{images}{text}<end_of_utterance>\nAssistant:"


def config_parts(tokenizer: object) -> dict[str, object]:
    """The config values that Idefics3 and SmolVLM share."""
    return {
        "text_config": {
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
        },
        "vision_config": {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": TILE,
            "patch_size": PATCH,
        },
        "image_token_id": tokenizer.convert_tokens_to_ids(SPECIAL["image"]),
        "scale_factor": SCALE,
        "pad_token_id": tokenizer.pad_token_id,
    }


def image_sizes(longest_edge: int) -> dict[str, dict[str, int]]:
    """Image processor settings: scale to `longest_edge`, cut into tiles where larger than a tile."""
    return {"size": {"longest_edge": longest_edge}, "max_image_size": {"longest_edge": TILE}}


def build() -> TinyVLM:
    """A 128 x 64 picture makes 1 x 2 tiles and the whole picture, a square one 2 x 2 and the whole."""
    tokenizer = byte_tokenizer(list(SPECIAL.values()), pad=SPECIAL["pad"], eos=SPECIAL["eos"])
    processor = offline(Idefics3Processor)(
        image_processor=Idefics3ImageProcessorPil(**image_sizes(2 * TILE)),
        tokenizer=tokenizer,
        image_seq_len=PER_TILE,
    )
    return TinyVLM(
        name="idefics3",
        model=seeded(Idefics3ForConditionalGeneration, Idefics3Config(**config_parts(tokenizer))),
        processor=processor,
        placeholder=SPECIAL["image"],
        special=SPECIAL,
        size=(128, 64),
        other_size=(64, 64),
        template=TEMPLATE,
    )
