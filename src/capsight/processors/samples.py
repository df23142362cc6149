"""Calibration samples of every form as processor outputs; pictures are read as commands read them."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import Any

from huggingface_hub import get_session
from PIL import Image
from transformers import ProcessorMixin

from capsight.errors import CalibrationError, OptionError
from capsight.pictures import picture

_SOURCES = ("image", "path", "url", "base64")
"""Keys under which an image of a chat message may be, as in transformers."""


def sample_inputs(sample: Any, processor: Any, index: int) -> Mapping[str, Any]:
    """Processor outputs of one sample.

    Args:
        sample: processor outputs (with `input_ids`), keyword arguments of the processor (`text`, `images`),
            or chat messages, whose images are files, PIL images, arrays, addresses or base64.
        processor: may be None where samples are processor outputs.
        index: of the sample, for messages.

    Raises:
        CalibrationError: there is no processor, or a sample is none of these.
        OptionError: a picture cannot be read.
    """
    if isinstance(sample, Mapping) and "input_ids" in sample:
        return sample
    if not isinstance(sample, Mapping | Sequence) or isinstance(sample, str | bytes):
        raise CalibrationError(
            f"sample {index} is a {type(sample).__name__}; pass processor outputs or lists of chat messages"
        )
    if processor is None:
        raise CalibrationError(f"sample {index} has no input_ids; pass the processor, or its outputs")
    try:
        if isinstance(sample, Mapping):
            shown = {k: _shown(v) if k == "images" and v is not None else v for k, v in sample.items()}
            return processor(**{"return_tensors": "pt", **shown})
        return _rendered([_message(message) for message in sample], processor)
    except OptionError as error:
        raise OptionError(f"sample {index}: {error}") from error


def _rendered(messages: list[dict[str, Any]], processor: Any) -> Mapping[str, Any]:
    if isinstance(processor, ProcessorMixin):
        outputs: Mapping[str, Any] = processor.apply_chat_template(  # type: ignore[assignment]
            messages, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
        )
        return outputs
    parts = [part for m in messages if not isinstance(m["content"], str) for part in m["content"]]
    images = [part["image"] for part in parts if part.get("type") == "image"]
    text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return processor(text=[text], images=[images] if images else None, return_tensors="pt", padding=True)


def _message(message: Any) -> dict[str, Any]:
    """A message whose images are RGB PIL images."""
    if not isinstance(message, Mapping) or "content" not in message:
        raise OptionError("a chat message is a mapping with role and content")
    content = message["content"]
    return {**message, "content": content if isinstance(content, str) else [_part(part) for part in content]}


def _part(part: Any) -> Any:
    if not isinstance(part, Mapping) or part.get("type") not in ("image", "image_url"):
        return part
    source = next((part[key] for key in _SOURCES if part.get(key) is not None), part.get("image_url"))
    if source is None:
        raise OptionError(f"an image of a message says nowhere where it is; give it as one of {_SOURCES}")
    source = source.get("url") if isinstance(source, Mapping) else source
    rest = {key: value for key, value in part.items() if key not in (*_SOURCES, "image_url")}
    return {**rest, "type": "image", "image": picture(_opened(source, "base64" in part))}


def _opened(source: Any, encoded: bool) -> Any:
    """The picture behind an address or a text; other sources as they are."""
    if isinstance(source, str) and (encoded or source.startswith("data:image/")):
        source = BytesIO(base64.b64decode(source.split(",")[-1]))
    elif isinstance(source, str) and source.startswith(("http://", "https://")):
        answer = get_session().get(source)
        answer.raise_for_status()
        source = BytesIO(answer.content)
    return Image.open(source) if isinstance(source, BytesIO) else source


def _shown(images: Any) -> Any:
    """Pictures, or lists of them, in RGB."""
    return [_shown(x) for x in images] if isinstance(images, list | tuple) else picture(images)
