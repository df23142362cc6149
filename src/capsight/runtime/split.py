"""Splits processor outputs into the images and the question that follows them (protocol `after`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

#: Entries with one column per token; all others of a processor's outputs belong to the images.
TOKEN_ENTRIES = ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids", "position_ids")


def first_tokens(inputs: Mapping[str, Any], length: int) -> dict[str, Any]:
    """The same inputs cut to their first `length` tokens, images included."""
    return {k: v[..., :length] if k in TOKEN_ENTRIES else v for k, v in inputs.items()}


def without_pixels(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The token entries alone: what a call needs whose images are all in the cache."""
    return {k: v for k, v in inputs.items() if k in TOKEN_ENTRIES}


def sequence_length(inputs: Mapping[str, Any]) -> int:
    """Tokens per row."""
    ids: Tensor = inputs["input_ids"]
    return ids.shape[-1]
