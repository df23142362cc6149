"""Calls that go past `FastModel` inside `enable`: `model.generate`, pipelines, one's own loop."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from threading import Lock
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from transformers.cache_utils import DynamicCache

from capsight.cache_argument import cache_of, with_cache
from capsight.errors import CapsightError
from capsight.kvcapsule import CapsuleCache, ContextRepeater
from capsight.runtime.positions import positions_of_caches
from capsight.runtime.state import current_state
from capsight.runtime.wrapped import inner_model

if TYPE_CHECKING:
    from capsight.runtime.fast_model import FastModel

_LOCK = Lock()
_OPEN: WeakKeyDictionary[Any, list[FastModel]] = WeakKeyDictionary()
_HERE: ContextVar[FastModel | None] = ContextVar("capsight_enabled", default=None)


@contextmanager
def serving(fast: FastModel) -> Iterator[None]:
    """Inside the block the model's own calls use what `fast` was enabled with.

    A prefill into a stock cache that is empty gets a cache of capsules instead, which transformers then
    goes on with, and follows the head map. Forward hooks do it; nothing of the model is replaced.
    """
    model = inner_model(fast.model)
    with _LOCK:
        _OPEN.setdefault(model, []).append(fast)
    before = _HERE.get()
    _HERE.set(fast)
    try:
        with ExitStack() as stack:
            stack.enter_context(positions_of_caches(model))
            if fast.capsule is not None or fast.head_map is not None:
                stack.enter_context(_prefills(model, fast))
            yield
    finally:
        _HERE.set(before)
        with _LOCK:
            _OPEN[model].remove(fast)


@contextmanager
def _prefills(model: Any, fast: FastModel) -> Iterator[None]:
    running: list[Any] = []

    def before(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        if current_state().generating or kwargs.get("input_ids") is None or not _is_for(fast, model):
            return None
        cache = cache_of(kwargs)
        if cache is not None and cache.get_seq_length():
            return None
        if fast.capsule is not None and not isinstance(cache, CapsuleCache):
            cache = _replaced(fast, cache, kwargs)
        state = fast._prefill_state(cache, kwargs)
        if state is not None:
            running.append(state)
            state.__enter__()
        return args, with_cache(kwargs, cache)

    def after(*_: Any) -> None:
        if running:
            running.pop().__exit__(None, None, None)

    hooks = [
        model.register_forward_pre_hook(before, with_kwargs=True),
        model.register_forward_hook(after, always_call=True),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _is_for(fast: FastModel, model: Any) -> bool:
    """Whether a call belongs to this `enable`: that of its own thread or task, or the only one there is."""
    here = _HERE.get()
    if here is None or inner_model(here.model) is not model:
        if len(_OPEN[model]) > 1:
            raise CapsightError(
                "the model is enabled more than once, and this call could mean any of them; call generate of "
                "what enable(...) gave"
            )
        return True
    return here is fast


def _replaced(fast: FastModel, cache: Any, kwargs: dict[str, Any]) -> Any:
    """A cache of capsules in place of an empty stock one."""
    if cache is None and kwargs.get("use_cache") is False:
        return None
    if cache is not None and type(cache) is not DynamicCache:
        warnings.warn(
            f"this call runs on a {type(cache).__name__}, not on capsules; leave its option out",
            stacklevel=2,
        )
        return cache
    new = fast.new_cache(kwargs)
    if isinstance(new, ContextRepeater):
        raise CapsightError(
            "this method reads the context twice, which only generate of what enable(...) gave can do"
        )
    return new
