"""Caches that go to a file and come back: with what they have read, and the positions to go on from."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from capsight.errors import ModelMismatchError, OptionError
from capsight.kvcapsule import CapsuleCache, KVCapsule
from capsight.kvcapsule.cache_file import SavedCache, load_cache, save_cache
from capsight.kvcapsule.prompt import Prompt
from capsight.runtime.noted import Noted
from capsight.runtime.positions import RopeDeltas


class Prompts:
    """Remembers the prompt of every cache, as long as the cache is there."""

    def __init__(self) -> None:
        """Know no cache."""
        self._known: Noted[Prompt] = Noted()

    def check(self, cache: Any, inputs: Mapping[str, Any]) -> None:
        """Refuse inputs that do not continue what `cache` has read, where that is known.

        Raises:
            LayoutError: they do not.
        """
        known = self._read_by(cache)
        if known is not None:
            known.check(inputs, cache.get_seq_length())

    def remember(self, cache: Any, inputs: Mapping[str, Any]) -> None:
        """Note that `cache` has read `inputs`, the whole conversation so far."""
        if "input_ids" in inputs:
            self._known.put(cache, Prompt.of(inputs, self._read_by(cache)))

    def of(self, cache: Any) -> Prompt:
        """What the rows of `cache` have read.

        Raises:
            OptionError: that is not known.
        """
        known = self._read_by(cache)
        if known is None:
            raise OptionError("there is no cache of a prompt yet; call encapsulate or generate first")
        return known

    def _read_by(self, cache: Any) -> Prompt | None:
        found = self._known.get(cache)
        if found is None or found.order is None:
            return None if found is None else found.value
        return found.value.following(found.order)

    def save(self, path: str | os.PathLike[str], cache: Any, capsule: Any, deltas: RopeDeltas) -> None:
        """Write `cache` to a file.

        Raises:
            OptionError: it is no capsule cache, or not one of this model.
            CapsightError: it cannot be saved, see `save_cache`.
        """
        if not isinstance(capsule, KVCapsule) or not isinstance(cache, CapsuleCache):
            raise OptionError("only caches of a KVCapsule can be saved; enable the model with capsule=")
        save_cache(path, SavedCache(cache, self.of(cache), deltas.of(cache)), capsule)

    def load(
        self, path: str | os.PathLike[str], model: Any, capsule: Any, deltas: RopeDeltas
    ) -> CapsuleCache:
        """The cache in a file, on the devices of the model.

        Raises:
            OptionError: the capsule in use is no KVCapsule.
            CapsuleFileError: the file cannot be read, see `load_cache`.
            ModelMismatchError: it was made for another model, dtype or capsule.
        """
        if not isinstance(capsule, KVCapsule):
            raise OptionError("only caches of a KVCapsule can be loaded; enable the model with capsule=")
        devices = {i: next(m.parameters()).device for i, m in enumerate(model.get_decoder().layers)}
        saved = load_cache(path, capsule, model.config, devices)
        dtype = next(iter(saved.cache.capsule_layers.values())).dtype
        if dtype != model.dtype:
            raise ModelMismatchError(
                f"{path} holds keys and values in {dtype}, the model runs in {model.dtype}; load the model "
                f"with dtype={dtype}"
            )
        self._known.put(saved.cache, saved.prompt)
        value = saved.rope_deltas
        deltas.assign(saved.cache, None if value is None else value.to(model.device))
        return saved.cache
