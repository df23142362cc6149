"""`FastModel`: a model with its capsule and head map; what `enable` hands out."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor

from capsight.blindsight import HeadMap
from capsight.errors import OptionError
from capsight.kvcapsule import CacheMethod, CapsuleCache, ContextRepeater
from capsight.layout import build_layout
from capsight.runtime.positions import RopeDeltas
from capsight.runtime.prefill import SparsePrefill
from capsight.runtime.repeat import ContextRepeat
from capsight.runtime.saved import Prompts
from capsight.runtime.split import (
    PIXEL_PREFIXES,
    TOKEN_ENTRIES,
    first_tokens,
    has_vision,
    sequence_length,
    tokens_after,
)
from capsight.runtime.state import RuntimeState, running

Decode = Literal["materialise", "latent"]
DECODES: tuple[Decode, ...] = ("materialise", "latent")
"""How attention gets at capsules."""


def check_decode(name: str) -> Decode:
    """The way to decode of that name.

    Raises:
        OptionError: there is none.
    """
    for known in DECODES:
        if name == known:
            return known
    raise OptionError(f"decode must be one of {list(DECODES)}, not {name!r}")


class FastModel:
    """A model with its capsule, as `enable` hands it out.

    Attributes:
        model: the transformers model, its weights and modules untouched.
        capsule: the capsule (or other method) in use, or None.
        head_map: the head map that prefill follows, or None.
        decode: how attention gets at capsules, "materialise" or "latent".
        cache: the cache of the last call; give it to the next turn as `past_key_values`.
    """

    def __init__(
        self, model: Any, capsule: CacheMethod | None, head_map: HeadMap | None, decode: Decode
    ) -> None:
        """Use `enable` instead."""
        self.model, self.capsule, self.head_map, self.decode = model, capsule, head_map, decode
        self.cache: Any = None
        self._deltas, self._prompts = RopeDeltas(model), Prompts()

    def new_cache(self, inputs: Mapping[str, Any]) -> Any:
        """An empty cache of the capsule in use for a batch of prompts; None without a capsule."""
        if self.capsule is None:
            return None
        cache = self.capsule.cache(inputs, self.model.config)
        if isinstance(cache, CapsuleCache):
            cache.honours_key_bias = True
        return cache

    def generate(self, past_key_values: Any = None, **inputs: Any) -> Tensor:
        """Generate, as `model.generate` does and with all of its options.

        Args:
            past_key_values: cache of an earlier turn or of `encapsulate`; by default a new one.
            **inputs: processor outputs of the whole conversation so far, and generation options.
                Images that the cache holds already are not looked at again.

        Returns:
            `[B, S + new]` token ids, prompt included (int64).

        Raises:
            LayoutError: the inputs do not continue what the cache holds.
        """
        cache = self.new_cache(inputs) if past_key_values is None else past_key_values
        if cache is not None and not cache.get_seq_length() and isinstance(cache, ContextRepeater):
            cache = self._prefilled(cache, inputs)
        prefill, given = None, inputs
        if cache is not None and cache.get_seq_length():
            inputs = self._continue(cache.get_seq_length(), inputs)
            self._prompts.check(cache, given)
            self._deltas.restore(cache)
        else:
            prefill = self._sparse(inputs, sequence_length(inputs))
        with self._running(cache, prefill):
            tokens: Tensor = self.model.generate(past_key_values=cache, **inputs)
        if cache is not None:
            self._deltas.remember(cache)
            self._prompts.remember(cache, given)
        self.cache = cache
        return tokens

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write `cache` to a file, to ask about its images later without prefilling them again.

        Args:
            path: the file, usually *.safetensors; an older one is replaced in one step.

        Raises:
            OptionError: there is no cache of a `KVCapsule` yet.
            CapsuleFileError: the file cannot be written; an older one is unharmed.
            CapsightError: the cache holds NaN or infinite numbers.

        Example:
            >>> fast.encapsulate(**inputs)
            >>> fast.save("images.safetensors")
            >>> fast.generate(past_key_values=fast.load("images.safetensors"), **inputs_of_a_question)
        """
        self._prompts.save(path, self.cache, self.capsule, self._deltas)

    def load(self, path: str | os.PathLike[str]) -> CapsuleCache:
        """Read a cache that `save` wrote, in this process or another, for `generate(past_key_values=...)`.

        Args:
            path: the file.

        Raises:
            CapsuleFileError: the file is missing, truncated or was changed.
            ModelMismatchError: it was made for another model or dtype, or with another capsule.
        """
        cache = self._prompts.load(path, self.model, self.capsule, self._deltas)
        cache.honours_key_bias = True
        self.cache = cache
        return cache

    @property
    def prompt_ids(self) -> Tensor:
        """The prompt that `cache` has read, images and padding included: int64 `[B, K]`, on the CPU.

        A further question goes after it; tokens generated since the prompt are not in it.

        Raises:
            OptionError: there is no cache yet.
        """
        return self._prompts.of(self.cache).input_ids

    def _continue(self, seen: int, inputs: dict[str, Any]) -> dict[str, Any]:
        """The inputs of a turn of text whose first `seen` tokens the cache holds: no pixels."""
        length = sequence_length(inputs)
        if length <= seen:
            raise OptionError(
                f"the cache holds {seen} tokens and the prompt has {length}; pass the whole "
                "conversation, with the new turn at its end"
            )
        if has_vision(tokens_after(inputs, seen), self.model.config):
            raise OptionError(
                "the new turn brings images; start a new cache for it (text alone can go on with this one)"
            )
        return {k: v for k, v in inputs.items() if not k.startswith(PIXEL_PREFIXES)}

    def _sparse(self, inputs: Mapping[str, Any], new: int) -> SparsePrefill | None:
        """The plan of a prefill of the first `new` tokens; None without a head map."""
        if self.head_map is None:
            return None
        layout = build_layout(inputs, self.model.config)
        return SparsePrefill(self.head_map, layout, self.model.config, seen=0, new=new)

    def _prefilled(self, cache: Any, inputs: dict[str, Any]) -> Any:
        """A cache of the images where it needs them to be read twice; else the empty `cache` as it is."""
        layout = build_layout(inputs, self.model.config)
        if not 0 < layout.last_vision_end < layout.length:
            return cache
        return self.encapsulate(
            **{k: v for k, v in inputs.items() if k in TOKEN_ENTRIES or k.startswith(PIXEL_PREFIXES)}
        )

    @contextmanager
    def _running(self, cache: Any, prefill: SparsePrefill | None = None) -> Iterator[None]:
        """What the attention function has to know while the model runs with `cache`."""
        capsules = cache if isinstance(cache, CapsuleCache) else None
        latent = capsules if self.decode == "latent" else None
        after = 0 if prefill is None else prefill.seen + prefill.new  # its chunks follow the head map
        with (
            running(RuntimeState(capsules, prefill)),
            nullcontext() if latent is None else latent.leaving_capsules(after),
        ):
            yield

    def encapsulate(self, **inputs: Any) -> Any:
        """Prefill the images alone (protocol `after`); what follows the last is left for `generate`.

        Args:
            **inputs: processor outputs; the part after the last image may be missing or is ignored.

        Returns:
            The cache, for `generate(past_key_values=..., **inputs)`: every later token attends to capsules.
        """
        layout = build_layout(inputs, self.model.config)
        length = layout.last_vision_end or sequence_length(inputs)
        head = first_tokens(inputs, length)
        cache = self.new_cache(head)
        repeat = ContextRepeat(self.model)
        with (
            self._running(cache, self._sparse(inputs, length)),
            repeat.recording() if isinstance(cache, ContextRepeater) else nullcontext(),
        ):
            # generate, not forward: it derives positions from the padding as later turns will.
            output = self.model.generate(
                **head, past_key_values=cache, max_new_tokens=1, do_sample=False, return_dict_in_generate=True
            )
        cache = output.past_key_values
        if isinstance(cache, ContextRepeater):

            def run(copy: Any) -> None:
                with running(RuntimeState(copy)):  # it has to see all tokens, also those of capsules
                    repeat.run(copy, head.get("attention_mask", torch.ones_like(head["input_ids"])))

            cache.repeat_context(run)
        self._deltas.remember(cache)
        if isinstance(cache, CapsuleCache):
            cache.keep_states()
        if cache is not None:
            self._prompts.remember(cache, head)
        self.cache = cache
        return cache
