"""Turns capsight's attention on while any `enable` of a model needs it, and off with the last of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any

from transformers.masking_utils import AttentionMaskInterface, eager_mask, sdpa_mask

from capsight.attention_swap import check_attention
from capsight.kvcapsule.cache.reader import ATTENTION_NAME
from capsight.runtime import attention  # noqa: F401  (registers the name)
from capsight.runtime.compiled import steps_mask
from capsight.runtime.state import current_state
from capsight.runtime.wrapped import inner_model

_LOCK = Lock()
_USERS: dict[int, tuple[int, str, Any]] = {}
"""By id of a text config, which several models may have: how many use it, what it had before, itself."""


@contextmanager
def capsight_attention_on(model: Any) -> Iterator[None]:
    """Inside the block the text model runs capsight's attention; blocks may overlap, in any order.

    Raises:
        UnsupportedModelError: the text model's own attention does more than capsight's can.
    """
    inner = inner_model(model)
    check_attention(inner)
    text = inner.config.get_text_config()
    with _LOCK:
        users, before, _ = _USERS.get(id(text), (0, text._attn_implementation, text))
        _USERS[id(text)] = users + 1, before, text
        if text._attn_implementation != ATTENTION_NAME:
            inner.set_attn_implementation({"text_config": ATTENTION_NAME})
    try:
        yield
    finally:
        with _LOCK:
            users, before, _ = _USERS.pop(id(text))
            if users > 1:
                _USERS[id(text)] = users - 1, before, text
            elif text._attn_implementation == ATTENTION_NAME:  # else somebody has chosen another meanwhile
                inner.set_attn_implementation({"text_config": before})


def attention_meanwhile(model: Any) -> tuple[Any, str | None]:
    """A model's text config, and what attention it had before `capsight_attention_on`; None: it has that."""
    text = model.config.get_text_config()
    _, before, _ = _USERS.get(id(text), (0, None, text))
    return text, before if text._attn_implementation == ATTENTION_NAME else None


def _mask(*args: Any, config: Any = None, **kwargs: Any) -> Any:
    """A mask that capsight's attention reads, and whatever the model runs once `enable` has ended.

    A forward pass of another thread may make its masks before that and read them afterwards.
    """
    steps = current_state().steps
    if steps is not None and kwargs.get("q_length") == 1:
        return steps_mask(steps, *args, config=config, **kwargs)
    _, before, _ = _USERS.get(id(config), (0, "sdpa", None))
    make = eager_mask if before == "eager" else sdpa_mask
    return make(*args, config=config, **kwargs)


AttentionMaskInterface.register(ATTENTION_NAME, _mask)
