"""`EnabledModel`: what an enabled model has in common with the model, and the cache of its last call."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from capsight.adapters import adapters_fingerprint, check_adapters
from capsight.blindsight import HeadMap
from capsight.errors import ModelMismatchError, OptionError
from capsight.execution import inputs_device
from capsight.kvcapsule import CacheMethod, CapsuleCache
from capsight.kvcapsule.cache.conversation import Conversation
from capsight.kvcapsule.method import for_model
from capsight.kvcapsule.rest import CapsuleStore
from capsight.layout import PromptLayout, build_layout
from capsight.model_fingerprint import model_fingerprint, same_model
from capsight.runtime.caches import is_empty_stock, is_stock
from capsight.runtime.calls import calling
from capsight.runtime.decode import Decode
from capsight.runtime.prefill import Prefill
from capsight.runtime.saved import load, save
from capsight.runtime.wrapped import inner_model


class EnabledModel:
    """A model, what it was enabled with, and the cache of the last call.

    Attributes:
        model: the transformers model, its weights and modules untouched.
        capsule: the capsule (or other method) in use, or None.
        head_map: the head map that prefill follows, or None.
        decode: how attention gets at capsules, "materialise" or "latent".
        prefill: which prefills follow the head map, "auto" or "sparse".
        store: where images are looked for that were read before, or None.
        cache: the cache of the last call; give it to the next turn as `past_key_values`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        capsule: CacheMethod | None,
        head_map: HeadMap | None,
        decode: Decode,
        store: CapsuleStore | None = None,
        prefill: Prefill = "auto",
    ) -> None:
        """Use `enable` instead."""
        self.model: Any = model
        self.capsule = None if capsule is None else for_model(capsule, model)
        self.head_map, self.decode, self.store = head_map, decode, store
        self.prefill: Prefill = prefill
        self.cache: Any = None

    def __repr__(self) -> str:
        """The model's class and dtype, and what it runs with."""
        capsule = "" if self.capsule is None else f", capsule={self.capsule!r}"
        heads = (
            ""
            if self.head_map is None
            else f", head_map={self.head_map.num_layers}x{self.head_map.num_heads}"
        )
        held = "" if self.cache is None else f", cache of {self.cache.get_seq_length()} tokens"
        kind = type(inner_model(self.model)).__name__
        return f"{type(self).__name__}({kind}, {self.dtype}{capsule}{heads}, decode={self.decode!r}{held})"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """A forward pass of the model, as it runs while it is enabled; see the model's own `forward`."""
        with calling(self):
            return self.model(*args, **kwargs)

    @property
    def config(self) -> PreTrainedConfig:
        """The model's config."""
        return self.model.config

    @property
    def generation_config(self) -> GenerationConfig:
        """The model's generation config."""
        return self.model.generation_config

    @property
    def device(self) -> torch.device:
        """Where the model's inputs go."""
        return inputs_device(self.model)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the model's weights."""
        return self.model.dtype

    def new_cache(self, inputs: Mapping[str, Any] | PromptLayout) -> Any:
        """An empty cache of the capsule in use for a batch of prompts; None without a capsule."""
        if self.capsule is None:
            return None
        cache = self.capsule.cache(inputs, self.model.config)
        if isinstance(cache, CapsuleCache):
            cache.lean = self.decode == "latent"
            cache.adapters = adapters_fingerprint(self.model)
        return cache

    def cache_for(self, cache: Any, inputs: Mapping[str, Any], knows: bool = True) -> Any:
        """The cache of a call that was given `cache`: a new one in place of none or of an empty stock one.

        Args:
            cache: what was given.
            inputs: processor outputs.
            knows: whether a new one knows its conversation; else the caller tells it.

        Raises:
            ModelMismatchError: the cache that was given belongs to another model, or to other adapters.
        """
        if cache is None or (self.capsule is not None and is_empty_stock(cache)):
            known = knows or self.capsule is None
            return self.new_cache(inputs if known else build_layout(inputs, self.model.config))
        if self.capsule is not None and is_stock(cache) and not hasattr(cache, "conversation"):
            warnings.warn(
                f"this call runs on the {type(cache).__name__} that was given, not on capsules", stacklevel=3
            )
        if isinstance(cache, CapsuleCache):
            if cache.fitted_to and not same_model(cache.fitted_to, self._fingerprint):
                raise ModelMismatchError(
                    "the cache was filled by another model, or by other weights of the same; make a new one"
                )
            if cache.get_seq_length():
                check_adapters(cache.adapters, self.model, "the cache")
            cache.adapters = adapters_fingerprint(self.model)
            cache.watch(self.config)
        return cache

    @cached_property
    def _fingerprint(self) -> str:
        """Of the model; `enable` has compared it with the capsule's."""
        info = getattr(self.capsule, "info", None)
        return model_fingerprint(self.model) if info is None else str(info.fingerprint)

    def save(
        self, path: str | os.PathLike[str], quality: float | None = None, bytes: int | None = None
    ) -> None:
        """Write `cache` to a file, to ask about its images later without prefilling them again.

        Args:
            path: the file, usually *.safetensors; an older one is replaced in one step.
            quality: in the form for rest (joint codec), several times smaller: the share of the variance of
                latents that comes back, such as 0.98; by default the cache as it is.
            bytes: instead of `quality`: the best that takes no more bytes.

        Raises:
            OptionError: there is no cache of a `KVCapsule` yet, or it cannot be had in this quality.
            CapsuleFileError: the file cannot be written; an older one is unharmed.
            CapsightError: the cache holds NaN or infinite numbers.

        Example:
            >>> fast.encapsulate(**inputs)
            >>> fast.save("images.safetensors")
            >>> fast.generate(past_key_values=fast.load("images.safetensors"), **inputs_of_a_question)
        """
        save(path, self.cache, self.capsule, self.model.config, quality, bytes)

    def load(self, path: str | os.PathLike[str]) -> CapsuleCache:
        """Read a cache that `save` wrote, in this process or another, for `generate(past_key_values=...)`.

        Args:
            path: the file.

        Raises:
            CapsuleFileError: the file is missing, truncated or was changed.
            ModelMismatchError: it was made for another model or dtype, or with another capsule.
        """
        self.cache = load(path, self.model, self.capsule)
        return self.cache

    @property
    def prompt_ids(self) -> Tensor:
        """The prompt that `cache` has read, images and padding included: int64 `[B, K]`, on the CPU.

        A further question goes after it; tokens generated since the prompt are not in it.

        Raises:
            OptionError: there is no cache yet.
        """
        read: Conversation | None = getattr(self.cache, "conversation", None)
        if read is None:
            raise OptionError("there is no cache of a prompt yet; call encapsulate or generate first")
        return read.input_ids[:, : read.prompt]
