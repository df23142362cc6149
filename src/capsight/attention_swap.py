"""A model's text layers run with another attention function for a while; nothing is patched."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface


@contextmanager
def swapped_attention(
    model: Any, name: str, attention: Callable[..., Any], mask: Callable[..., Any]
) -> Iterator[None]:
    """Inside the context the text model attends with `attention`, afterwards with what it had before.

    Args:
        model: a transformers vision-language model.
        name: under which the function is registered with transformers.
        attention: of transformers' signature: returns `[B, S, Hq, D]`, and weights or None.
        mask: makes the masks that it is given; of transformers' signature.
    """
    before = model.config.get_text_config(decoder=True)._attn_implementation
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, mask)
    try:
        model.set_attn_implementation({"text_config": name})
        yield
    finally:
        model.set_attn_implementation({"text_config": before})
