"""A model's text layers run with another attention function, or past `enable`; nothing is patched."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from capsight.errors import UnsupportedModelError


def attention_fits(model: Any) -> bool:
    """Whether attention of capsight's can stand in for a text model's own.

    It cannot where scores are capped or have sinks (Gemma 2, gpt-oss): what SDPA cannot, it cannot either.
    (Gemma 2 of transformers 5.17 says that SDPA can.)
    """
    caps = getattr(model.config.get_text_config(decoder=True), "attn_logit_softcapping", None)
    return caps is None and bool(getattr(model.get_decoder(), "_supports_sdpa", True))


def check_attention(model: Any) -> None:
    """Refuse to put another attention in the place of a text model's own where that would not be the same.

    Raises:
        UnsupportedModelError: it would not.
    """
    if not attention_fits(model):
        raise UnsupportedModelError(
            f"the attention of {type(model.get_decoder()).__name__} does more than a softmax (caps, sinks), "
            "and capsight's does not; use the joint codec with decode='materialise' and no head map"
        )


_UNSERVED: ContextVar[bool] = ContextVar("capsight_unserved", default=False)


@contextmanager
def unserved() -> Iterator[None]:
    """Inside the block calls of models are their own, also where `enable` serves them capsules."""
    token = _UNSERVED.set(True)
    try:
        yield
    finally:
        _UNSERVED.reset(token)


def is_unserved() -> bool:
    """Whether calls of models are their own here: something is being fitted to them."""
    return _UNSERVED.get()


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

    Raises:
        UnsupportedModelError: the text model's own attention does more than a softmax.
    """
    check_attention(model)
    before = model.config.get_text_config(decoder=True)._attn_implementation
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, mask)
    try:
        model.set_attn_implementation({"text_config": name})
        yield
    finally:
        model.set_attn_implementation({"text_config": before})
