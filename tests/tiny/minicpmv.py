"""Tiny MiniCPM-V 4.6 and 4.7: a picture and its slices, Qwen3.5 (states beside attention)."""

from __future__ import annotations

import transformers
from packaging.version import Version
from transformers.models.minicpmv4_6.image_processing_pil_minicpmv4_6 import MiniCPMV4_6ImageProcessorPil

from tiny.base import TinyVLM, byte_tokenizer, offline, seeded
from tiny.qwen3_5 import hybrid_text
from tiny.video import PicturedVideos

SPECIAL = {
    "pad": "<|endoftext|>",
    "turn": "<|im_start|>",
    "eos": "<|im_end|>",
    "start": "<image>",
    "end": "</image>",
    "slice_start": "<slice>",
    "slice_end": "</slice>",
    "id_start": "<image_id>",
    "id_end": "</image_id>",
    "image": "<|image_pad|>",
    "video": "<|video_pad|>",
}
MARKERS = {
    "image_start": "start",
    "image_end": "end",
    "slice_start": "slice_start",
    "slice_end": "slice_end",
}
PATCH, SIDE = 4, 128
CLASSES = {"minicpmv4_6": "MiniCPMV4_6", "minicpmv4_7": "MiniCPMV4_7"}


def build(name: str) -> TinyVLM:
    """A 128 x 128 picture makes 8 x 8 tokens; 256 x 128 the same for the whole and for slices."""
    tokenizer = byte_tokenizer(
        list(SPECIAL.values()),
        pad=SPECIAL["pad"],
        eos=SPECIAL["eos"],
        image_token=SPECIAL["image"],
        video_token=SPECIAL["video"],
        image_start_token=SPECIAL["start"],
        image_end_token=SPECIAL["end"],
        slice_start_token=SPECIAL["slice_start"],
        slice_end_token=SPECIAL["slice_end"],
        image_id_start_token=SPECIAL["id_start"],
        image_id_end_token=SPECIAL["id_end"],
    )
    images = MiniCPMV4_6ImageProcessorPil(patch_size=PATCH, scale_resolution=SIDE, max_slice_nums=4)
    names = {
        "pixel_values": "pixel_values_videos",
        "target_sizes": "target_sizes_videos",
        "grids": "grids_videos",
    }
    videos = PicturedVideos(images, names, timed=False, slice_mode=False)
    if not hasattr(transformers, f"{CLASSES[name]}Config"):
        raise ImportError(f"no {CLASSES[name]}Config")
    if Version(transformers.__version__) < Version("5.20"):
        raise ImportError("its tower takes pictures of one size only")
    parts = ("Config", "ForConditionalGeneration", "Processor")
    config_class, model_class, processor_class = (
        getattr(transformers, f"{CLASSES[name]}{part}") for part in parts
    )
    processor = offline(processor_class)(image_processor=images, tokenizer=tokenizer, video_processor=videos)
    ids = {key: tokenizer.convert_tokens_to_ids(text) for key, text in SPECIAL.items()}
    markers = {}
    if name == "minicpmv4_7":
        markers = {f"{kind}_id": ids[key] for kind, key in MARKERS.items()}
        markers["newline_id"] = tokenizer.convert_tokens_to_ids("Ċ")
    config = config_class(
        **markers,
        text_config=hybrid_text(processor) | {"model_type": "qwen3_5_text"},
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "image_size": SIDE,
            "patch_size": PATCH,
            "insert_layer_id": 1,
        },
        insert_layer_id=1,
        image_size=SIDE,
        image_token_id=ids["image"],
        video_token_id=ids["video"],
    )
    return TinyVLM(
        name=name,
        model=seeded(model_class, config),
        processor=processor,
        placeholder=SPECIAL["image"],
        video_placeholder=SPECIAL["video"],
        special=SPECIAL,
        size=(SIDE, SIDE),
        other_size=(2 * SIDE, SIDE),
    )
