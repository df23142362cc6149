"""Turns capsight's attention on while any `enable` of a model needs it, and off with the last of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any
from weakref import WeakKeyDictionary

from capsight.attention_swap import check_attention
from capsight.kvcapsule.cache.reader import ATTENTION_NAME
from capsight.runtime import attention  # noqa: F401  (registers the name)
from capsight.runtime.wrapped import inner_model

_LOCK = Lock()
_USERS: WeakKeyDictionary[Any, tuple[int, str]] = (
    WeakKeyDictionary()
)  # of each model: how many, what it had before


@contextmanager
def capsight_attention_on(model: Any) -> Iterator[None]:
    """Inside the block the text model runs capsight's attention; blocks may overlap.

    Raises:
        UnsupportedModelError: the text model's own attention does more than capsight's can.
    """
    inner = inner_model(model)
    check_attention(inner)
    text = inner.config.get_text_config()
    with _LOCK:
        users, before = _USERS.get(inner, (0, text._attn_implementation))
        _USERS[inner] = users + 1, before
        if not users:
            inner.set_attn_implementation({"text_config": ATTENTION_NAME})
    try:
        yield
    finally:
        with _LOCK:
            users, before = _USERS.pop(inner)
            if users > 1:
                _USERS[inner] = users - 1, before
            else:
                inner.set_attn_implementation({"text_config": before})
