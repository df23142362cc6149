"""A tiny InternVL and Qianfan-OCR: a 64 x 64 picture is one tile of 64 tokens, 128 x 64 three."""

from __future__ import annotations

from transformers import (
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    PreTrainedTokenizerFast,
    QianfanOCRConfig,
    QianfanOCRForConditionalGeneration,
    QianfanOCRProcessor,
)
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

from tiny.base import TinyVLM, byte_tokenizer, offline, seeded
from tiny.video import FrameVideos

SPECIAL = {
    "pad": "<|endoftext|>",
    "turn": "<|im_start|>",
    "eos": "<|im_end|>",
    "start": "<img>",
    "end": "</img>",
    "image": "<IMG_CONTEXT>",
    "video": "<video>",
}
TILE, PATCH = 64, 4
PER_TILE = (TILE // PATCH // 2) ** 2


def _tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer(
        list(SPECIAL.values()),
        pad=SPECIAL["pad"],
        eos=SPECIAL["eos"],
        start_image_token=SPECIAL["start"],
        end_image_token=SPECIAL["end"],
        context_image_token=SPECIAL["image"],
        video_token=SPECIAL["video"],
    )


def _parts(tokenizer: PreTrainedTokenizerFast, text: str) -> dict[str, object]:
    return {
        "text_config": {
            "model_type": text,
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
            "image_size": [TILE, TILE],
            "patch_size": [PATCH, PATCH],
        },
        "image_token_id": tokenizer.convert_tokens_to_ids(SPECIAL["image"]),
        "image_seq_length": PER_TILE,
        "tie_word_embeddings": False,
    }


def build() -> TinyVLM:
    tokenizer = _tokenizer()
    processor = offline(InternVLProcessor)(
        image_processor=GotOcr2ImageProcessorPil(size={"height": TILE, "width": TILE}, max_patches=2),
        tokenizer=tokenizer,
        video_processor=FrameVideos("pixel_values_videos", TILE),
        image_seq_length=PER_TILE,
    )
    config = InternVLConfig(**_parts(tokenizer, "qwen2"))
    return TinyVLM(
        name="internvl",
        model=seeded(InternVLForConditionalGeneration, config),
        processor=processor,
        placeholder=SPECIAL["image"] + "\n",
        video_placeholder=SPECIAL["video"] + "\n",
        special=SPECIAL,
        size=(64, 64),
        other_size=(128, 64),
    )


def build_qianfan() -> TinyVLM:
    tokenizer = _tokenizer()
    images = GotOcr2ImageProcessorPil(size={"height": TILE, "width": TILE}, max_patches=2)
    processor = offline(QianfanOCRProcessor)(images, tokenizer, PER_TILE, image_placeholder_token="<image>")
    parts = _parts(tokenizer, "qwen3")
    parts["text_config"]["head_dim"] = 16
    config = QianfanOCRConfig(**parts)
    return TinyVLM(
        name="qianfan_ocr",
        model=seeded(QianfanOCRForConditionalGeneration, config),
        processor=processor,
        placeholder="<image>\n",
        special=SPECIAL,
        size=(64, 64),
        other_size=(128, 64),
    )
