"""Splits processor outputs into the images and the question that follows them (protocol `after`)."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from capsight.errors import LayoutError
from capsight.layout import build_layout
from capsight.runtime.wrapped import inner_model

#: Entries that describe images and are not needed once the cache holds them.
PIXEL_PREFIXES = (
    *("pixel_", "image_", "video_", "second_per_grid", "batch_num_images"),
    *("target_sizes", "downsample_mode", "spatial_shapes", "num_soft_tokens", "num_frames_per_video"),
)
#: Entries with one column per token; all others of a processor's outputs belong to the images.
TOKEN_ENTRIES = ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids", "position_ids")
_OF_ALL = ("past_key_values", "cache", "use_cache", "inputs_embeds", "labels", "logits_to_keep", "kwargs")


def prompt_entries(inputs: Mapping[str, Any], model: Any) -> dict[str, Any]:
    """Tokens and pixels, and what else a model is told of how to read them; no options of `generate`."""
    parameters = inspect.signature(inner_model(model).forward).parameters
    return {
        name: value
        for name, value in inputs.items()
        if name in TOKEN_ENTRIES
        or name.startswith(PIXEL_PREFIXES)
        or (name in parameters and name not in _OF_ALL and not name.startswith("output_"))
    }


def without_nothing(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The same inputs without tokens and pixels that are None; options keep their None."""
    return {
        name: value
        for name, value in inputs.items()
        if value is not None or not (name in TOKEN_ENTRIES or name.startswith(PIXEL_PREFIXES))
    }


def first_tokens(inputs: Mapping[str, Any], length: int) -> dict[str, Any]:
    """The same inputs cut to their first `length` tokens, images included."""
    return {k: v[..., :length] if k in TOKEN_ENTRIES else v for k, v in inputs.items()}


def tokens_after(inputs: Mapping[str, Any], length: int) -> dict[str, Any]:
    """The token entries of what follows the first `length` tokens; no pixels."""
    return {k: v[..., length:] for k, v in inputs.items() if k in TOKEN_ENTRIES}


def brings_pixels(inputs: Mapping[str, Any]) -> bool:
    """Whether the arguments of a forward pass hold images or videos, encoded or not."""
    return any(
        (value is not None and name.startswith("pixel_values")) or (name == "mm_encoder_outputs" and value)
        for name, value in inputs.items()
    )


def has_vision(tokens: Mapping[str, Any], config: Any) -> bool:
    """Whether token entries without pixels hold an image or a video."""
    try:
        return build_layout(tokens, config).vision_tokens > 0
    except LayoutError:
        return True  # vision tokens without their grids, or cut ones


def sequence_length(inputs: Mapping[str, Any]) -> int:
    """Tokens per row.

    Raises:
        LayoutError: there are no token ids, as with `inputs_embeds` alone.
    """
    if inputs.get("input_ids") is None:
        raise LayoutError("the layout needs 'input_ids'; pass the processor's outputs as they are")
    ids: Tensor = inputs["input_ids"]
    return ids.shape[-1]
