"""A tiny Gemma 3: sliding and full layers, bidirectional images of 8 x 8 tokens whatever their size."""

from __future__ import annotations

from transformers import Gemma3Config, Gemma3ForConditionalGeneration, Gemma3Processor
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

from tiny.base import TinyVLM, byte_tokenizer, offline, seeded

SPECIAL = {
    "pad": "<pad>",
    "bos": "<bos>",
    "turn": "<start_of_turn>",
    "eos": "<end_of_turn>",
    "start": "<start_of_image>",
    "end": "<end_of_image>",
    "image": "<image_soft_token>",
}
SIDE = 8


def build() -> TinyVLM:
    tokenizer = byte_tokenizer(
        list(SPECIAL.values()),
        pad=SPECIAL["pad"],
        eos=SPECIAL["eos"],
        bos=SPECIAL["bos"],
        boi_token=SPECIAL["start"],
        eoi_token=SPECIAL["end"],
        image_token=SPECIAL["image"],
    )
    processor = offline(Gemma3Processor)(
        image_processor=Gemma3ImageProcessorPil(size={"height": 64, "width": 64}),
        tokenizer=tokenizer,
        image_seq_length=SIDE * SIDE,
    )
    config = Gemma3Config(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "query_pre_attn_scalar": 16,
            "sliding_window": 96,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "pad_token_id": tokenizer.pad_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "bos_token_id": tokenizer.bos_token_id,
        },
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 64,
            "patch_size": 4,
            "vision_use_head": False,
        },
        mm_tokens_per_image=SIDE * SIDE,
        boi_token_index=tokenizer.convert_tokens_to_ids(SPECIAL["start"]),
        eoi_token_index=tokenizer.convert_tokens_to_ids(SPECIAL["end"]),
        image_token_index=tokenizer.convert_tokens_to_ids(SPECIAL["image"]),
    )
    return TinyVLM(
        name="gemma3",
        model=seeded(Gemma3ForConditionalGeneration, config, embedding_std=0.02),
        processor=processor,
        placeholder=SPECIAL["start"],
        special=SPECIAL,
        size=(64, 64),
        other_size=(96, 64),
        template="<bos><start_of_turn>user\n{images}{text}<end_of_turn>\n<start_of_turn>model\n",
    )
