"""A tiny SmolVLM: tiles of 64 tokens whose tags are single tokens; every picture is one tile.

`SmolVLMProcessor` wants the package num2words, only to write how many frames a video has; where it
is missing, `str` takes its place.
"""

from __future__ import annotations

from transformers import SmolVLMConfig, SmolVLMForConditionalGeneration, SmolVLMProcessor
from transformers.models.smolvlm import processing_smolvlm
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from tiny.base import TinyVLM, byte_tokenizer, offline, seeded
from tiny.idefics3 import PER_TILE, SPECIAL, TEMPLATE, TILE, config_parts, image_sizes
from tiny.video import FrameVideos

TAGS = ["<global-img>", *(f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2))]


def build() -> TinyVLM:
    processing_smolvlm.num2words = processing_smolvlm.num2words or str
    tokenizer = byte_tokenizer(
        [*SPECIAL.values(), *TAGS, "<video>"],
        pad=SPECIAL["pad"],
        eos=SPECIAL["eos"],
        fake_image_token=SPECIAL["fake"],
        image_token=SPECIAL["image"],
        global_image_token=TAGS[0],
        video_token="<video>",
    )
    processor = offline(SmolVLMProcessor)(
        image_processor=SmolVLMImageProcessorPil(**image_sizes(TILE)),
        tokenizer=tokenizer,
        video_processor=FrameVideos("pixel_values", TILE),
        image_seq_len=PER_TILE,
    )
    return TinyVLM(
        name="smolvlm",
        model=seeded(SmolVLMForConditionalGeneration, SmolVLMConfig(**config_parts(tokenizer))),
        processor=processor,
        placeholder=SPECIAL["image"],
        video_placeholder="<video>",
        special=SPECIAL,
        size=(64, 64),
        other_size=(64, 32),
        template=TEMPLATE,
    )
