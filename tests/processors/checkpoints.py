"""Tiny models saved as checkpoints on the hub are: one processor file a part, or one for all parts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tiny import TinyVLM

VIDEOS = {
    "qwen2_vl": "Qwen2VLVideoProcessor", "qwen2_5_vl": "Qwen2VLVideoProcessor",
    "qwen3_vl": "Qwen3VLVideoProcessor", "llava_onevision": "LlavaOnevisionVideoProcessor",
    "internvl": "InternVLVideoProcessor",
    "smolvlm": "SmolVLMVideoProcessor",
}  # fmt: skip
"""The six families whose processors have a part for videos."""

EIGHT = sorted([*VIDEOS, "gemma3", "idefics3"])
"""The families whose checkpoints are written here."""

SETTINGS = ("num_image_tokens", "vision_feature_select_strategy", "image_seq_length", "image_seq_len")


def template(vlm: TinyVLM) -> str:
    """A chat template that writes what `vlm.prompt` writes."""
    before, _, after = vlm.template.partition("{images}")
    between, _, end = after.partition("{text}")
    image = "{{ " + repr(vlm.placeholder) + " }}"
    turn = (
        "{%- for message in messages -%}{%- for part in message['content'] -%}"
        f"{{%- if part['type'] == 'image' -%}}{image}"
        f"{{%- else -%}}{{{{ {between!r} ~ part['text'] }}}}{{%- endif -%}}"
        "{%- endfor -%}{%- endfor -%}"
    )
    return f"{{{{ {before!r} }}}}{turn}{{{{ {end!r} }}}}"


def save(vlm: TinyVLM, folder: Path, form: str) -> Path:
    """Write model, tokenizer, template and processor files; `form` is "parts" or "whole"."""
    processor: Any = vlm.processor
    kind = type(processor).__name__
    vlm.save(folder)
    processor.tokenizer.save_pretrained(folder)
    images = processor.image_processor.to_dict() | {"processor_class": kind}
    images["image_processor_type"] = type(processor.image_processor).__name__.removesuffix("Pil")
    settings = {name: getattr(processor, name) for name in SETTINGS if hasattr(processor, name)}
    settings["processor_class"] = kind
    videos = {"video_processor_type": VIDEOS[vlm.name]} if vlm.name in VIDEOS else None
    files: dict[str, Any] = {"processor_config.json": settings}
    if form == "whole":
        settings["image_processor"] = images
        if videos:
            settings["video_processor"] = videos
    else:
        files["preprocessor_config.json"] = images
        if videos:
            files["video_preprocessor_config.json"] = videos | {"processor_class": kind}
    for name, values in files.items():
        (folder / name).write_text(json.dumps(values, default=list))
    (folder / "chat_template.jinja").write_text(template(vlm))
    return folder
