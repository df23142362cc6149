"""Calls that go past `FastModel` inside `enable`: `model.generate`, pipelines, one's own loop."""

from __future__ import annotations

import inspect
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from contextvars import ContextVar
from typing import Any
from weakref import WeakKeyDictionary

from transformers.cache_utils import Cache

from capsight.adapters import check_adapters
from capsight.attention_swap import is_unserved
from capsight.cache_argument import cache_of, with_cache
from capsight.errors import CapsightError, LayoutError, UnsupportedModelError
from capsight.kvcapsule import CapsuleCache, ContextRepeater
from capsight.runtime.compiled import is_step
from capsight.runtime.options import check_attentions
from capsight.runtime.positions import positions_of_caches
from capsight.runtime.split import brings_pixels
from capsight.runtime.state import current_state
from capsight.runtime.switch import attention_meanwhile
from capsight.runtime.wrapped import inner_model

_LOCK = threading.Lock()
_OPEN: WeakKeyDictionary[Any, tuple[list[Any], ExitStack]] = WeakKeyDictionary()
_HERE: ContextVar[tuple[Any, ...]] = ContextVar("capsight_enabled", default=())
_RUNNING = threading.local()


@contextmanager
def serving(fast: Any) -> Iterator[None]:
    """Inside the block the model's own calls use what `fast` was enabled with, in this thread or task.

    `model.generate`, which pipelines call, is `fast.generate` meanwhile. A forward pass that prefills into
    no cache, or into a stock one that is empty, gets a cache of capsules, with which transformers then goes
    on, and follows the head map.
    """
    model = inner_model(fast.model)
    with _LOCK:
        if model not in _OPEN:
            _OPEN[model] = [], _installed(model)
        _OPEN[model][0].append(fast)
    _HERE.set((*_HERE.get(), fast))
    try:
        yield
    finally:
        end_broken_pass()
        _HERE.set(tuple(other for other in _HERE.get() if other is not fast))
        with _LOCK:
            users, installed = _OPEN[model]
            users.remove(fast)
            if not users:
                del _OPEN[model]
                installed.close()


@contextmanager
def calling(fast: Any) -> Iterator[None]:
    """Inside the block the model's calls are `fast`'s, whatever else is enabled."""
    before = _HERE.set((*_HERE.get(), fast))
    try:
        yield
    finally:
        _HERE.reset(before)


def serving_here(model: Any) -> Any:
    """What the calls of `model` from this thread or task are to use; None: nothing of ours."""
    if is_unserved() or current_state().generating:
        return None
    here = next((fast for fast in reversed(_HERE.get()) if inner_model(fast.model) is model), None)
    if here is None and any(fast.capsule or fast.head_map for fast in _OPEN.get(model, ([],))[0]):
        warnings.warn(
            "this thread is not inside the enable(...) of its model: the call runs on the full cache; call "
            "generate of what enable(...) gave, or run it in contextvars.copy_context()",
            stacklevel=4,
        )
    return here


class Served:
    """What a model has for `generate`, and what runs around its forward passes, while it is enabled.

    A copy of the model, be it by `copy.deepcopy` or by pickle, takes it along, but is not enabled: there it
    is what the model's class has.
    """

    def __init__(self, model: Any) -> None:
        """Serve `model`."""
        self._model, self._own = model, model.__dict__.get("generate")
        self._parts: tuple[Any, ...] = model, model.base_model

    def __getstate__(self) -> tuple[Any, ...]:
        """What goes with a copy of the model: also the attention that the copy is to have."""
        return self._model, self._own, *attention_meanwhile(self._model)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        """Serve a copy of the model, which is not whole yet, with nothing."""
        self._model, self._own, text, attention = state
        self._parts = ()
        if attention is not None:
            text._attn_implementation = attention

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """`model.generate`: that of the `FastModel`, or the model's own where nothing is enabled here."""
        original = type(self._model).generate if self._own is None else self._own
        before = (self._model,) if self._own is None else ()
        fast = (
            None
            if isinstance(cache_of(kwargs), CapsuleCache) and not _HERE.get()
            else serving_here(self._model)
        )
        if fast is None or (fast.capsule is None and fast.head_map is None):
            return original(*before, *args, **kwargs)
        bound = inspect.signature(type(self._model).generate).bind(self._model, *args, **kwargs)
        given = {name: value for name, value in bound.arguments.items() if name != "self"}
        return fast.generate(**given | given.pop("kwargs", {}))

    def batching(self, *args: Any, **kwargs: Any) -> Any:
        """`model.init_continuous_batching`, which `generate_batch` begins with.

        Raises:
            UnsupportedModelError: capsules or a head map are enabled.
        """
        if any(fast.capsule or fast.head_map for fast in _OPEN.get(self._model, ([],))[0]):
            raise UnsupportedModelError(
                "continuous batching (generate_batch) keeps keys and values in pages of its own, not in "
                "capsules, and changes the model's attention; call it outside enable(...), or use "
                "`capsight serve`"
            )
        return type(self._model).init_continuous_batching(self._model, *args, **kwargs)

    def before(self, module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        """Give a prefill its cache of capsules, be it one of the model or of what is below its head."""
        if is_step(kwargs) or module not in self._parts or is_unserved() or current_state().generating:
            return None
        if module is not self._model and _inside() is self._model:
            return None
        end_broken_pass()
        _RUNNING.inside = module
        if args:
            kwargs = dict(inspect.signature(module.forward).bind(*args, **kwargs).arguments)
            kwargs |= kwargs.pop("kwargs", {})
        cache = cache_of(kwargs)
        if cache is not None and cache.get_seq_length():
            if isinstance(cache, CapsuleCache):
                if brings_pixels(kwargs):
                    raise CapsightError(
                        "a forward pass cannot bring images to a cache that is filled; call generate, or "
                        "encapsulate of what enable(...) gave, with the whole conversation"
                    )
                ids = kwargs.get("input_ids")
                if ids is None or ids.shape[-1] > 1:  # not at each step
                    check_adapters(cache.adapters, module, "the cache")
                cache.watch(module.config)
            return None
        fast = serving_here(self._model)
        if fast is None or (fast.capsule is None and fast.head_map is None):
            return None
        if kwargs.get("input_ids") is None:
            _warn_of_full_cache()
            return None
        if kwargs.get("output_attentions"):
            check_attentions(module)
        if kwargs.get("use_cache") is not False or cache is not None:
            cache = _forward_cache(fast, cache, kwargs)
        state = fast.prefill_state(cache, kwargs)
        if state is not None:
            state.__enter__()
            _RUNNING.state = state
        return (), with_cache(kwargs, cache)

    def after(self, module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        """End what `before` began."""
        here = module in self._parts and _inside() is module
        if here and not is_step(kwargs) and not current_state().generating:
            end_broken_pass()

    def text(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        """Tell whoever calls the text model by itself that nothing here can know where its images are."""
        if is_step(kwargs) or is_unserved() or current_state().generating or _inside() is not None:
            return
        if not self._parts:
            return
        fast = serving_here(self._model)
        if fast is not None and (fast.capsule or fast.head_map) and not isinstance(cache_of(kwargs), Cache):
            _warn_of_full_cache()


def _inside() -> Any:
    """The model, or the part of it, whose forward pass this thread is in; None: none that `before` saw."""
    return getattr(_RUNNING, "inside", None)


def _warn_of_full_cache() -> None:
    warnings.warn("a call without input_ids runs on the full cache, not on capsules", stacklevel=5)


def end_broken_pass() -> None:
    """End what `Served.before` began in this thread; forward hooks are not told of a KeyboardInterrupt."""
    _RUNNING.inside = None
    state, _RUNNING.state = getattr(_RUNNING, "state", None), None
    if state is not None:
        with suppress(ValueError):  # begun in another task
            state.__exit__(None, None, None)


def _installed(model: Any) -> ExitStack:
    """Put a `Served` on a model, until the stack is closed."""
    served, stack = Served(model), ExitStack()
    stack.enter_context(positions_of_caches(model))
    for part in (model, model.base_model):
        stack.callback(part.register_forward_pre_hook(served.before, with_kwargs=True).remove)
        # With a hook that is always called inside of it, a graph of the model would be good for one `enable`.
        after = part.register_forward_hook(served.after, with_kwargs=True, always_call=part is model)
        stack.callback(after.remove)
    stack.callback(model.get_decoder().register_forward_pre_hook(served.text, with_kwargs=True).remove)
    for name, method in (("generate", served), ("init_continuous_batching", served.batching)):
        if hasattr(model, name):
            original = model.__dict__.get(name)
            setattr(model, name, method)
            stack.callback(
                *((delattr, model, name) if original is None else (setattr, model, name, original))
            )
    return stack


def _forward_cache(fast: Any, cache: Any, inputs: Mapping[str, Any]) -> Any:
    """The cache for a forward pass that begins a conversation."""
    try:
        new = fast.cache_for(cache, inputs)
    except LayoutError as error:
        if not inputs.get("mm_encoder_outputs"):
            raise
        raise CapsightError(
            "this generate is not the one that enable(...) has put on the model, but that of its class; call "
            "model.generate inside the context, or generate of what enable(...) gave"
        ) from error
    if isinstance(new, ContextRepeater):
        raise CapsightError(
            "this method reads the context twice, which generate can do and a forward pass cannot"
        )
    return new
