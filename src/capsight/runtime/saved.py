"""Caches that go to a file and come back, with what they have read."""

from __future__ import annotations

import os
from functools import partial
from typing import Any

from capsight.adapters import check_adapters
from capsight.errors import ModelMismatchError, OptionError
from capsight.execution import module_device
from capsight.kvcapsule import CapsuleCache, KVCapsule
from capsight.kvcapsule.cache_file import load_cache, save_cache
from capsight.kvcapsule.rest import check_quality, is_rest_file, load_rest, save_rest
from capsight.runtime.text_pass import can_read_text, read_text


def save(
    path: str | os.PathLike[str],
    cache: Any,
    capsule: Any,
    config: Any,
    quality: float | None = None,
    nbytes: int | None = None,
) -> None:
    """Write a cache to a file; at rest with `quality`, or in `nbytes`.

    Raises:
        OptionError: it is no capsule cache, or not one of this capsule; or `quality` or `nbytes` are out of
            range or both given, or the codec is not joint.
        CapsightError: it cannot be saved, see `save_cache`.
    """
    if not isinstance(capsule, KVCapsule) or not isinstance(cache, CapsuleCache):
        raise OptionError("only caches of a KVCapsule can be saved; enable the model with capsule=")
    if quality is not None and nbytes is not None:
        raise OptionError("name a quality or a number of bytes, not both")
    if nbytes is not None and (isinstance(nbytes, bool) or not isinstance(nbytes, int) or nbytes < 1):
        raise OptionError(f"bytes is how many a file may take, not {nbytes!r}")
    if quality is not None:
        check_quality(quality)
    if quality is None and nbytes is None:
        save_cache(path, cache, capsule)
    else:
        save_rest(path, cache, capsule, quality, can_read_text(config), nbytes)


def load(path: str | os.PathLike[str], model: Any, capsule: Any) -> CapsuleCache:
    """The cache in a file, on the devices of the model.

    Raises:
        OptionError: the capsule in use is no KVCapsule.
        CapsuleFileError: the file cannot be read, see `load_cache`.
        ModelMismatchError: it was made for another model, dtype or capsule, or with other adapters.
    """
    if not isinstance(capsule, KVCapsule):
        raise OptionError("only caches of a KVCapsule can be loaded; enable the model with capsule=")
    devices = {i: module_device(layer) for i, layer in enumerate(model.get_decoder().layers)}
    if is_rest_file(path):
        reread = partial(read_text, model, capsule.codecs)
        cache = load_rest(path, capsule, model.config, devices, model.dtype, reread)
        check_adapters(cache.adapters, model, str(path))
        return cache
    cache = load_cache(path, capsule, model.config, devices)
    check_adapters(cache.adapters, model, str(path))
    dtype = next(iter(cache.capsule_layers.values())).dtype
    if dtype != model.dtype:
        raise ModelMismatchError(
            f"{path} holds keys and values in {dtype}, the model runs in {model.dtype}; load the model "
            f"with dtype={dtype}"
        )
    return cache
