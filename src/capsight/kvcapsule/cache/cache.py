"""`CapsuleCache`: a transformers `Cache` that keeps vision keys and values as capsules."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from capsight.errors import ModelMismatchError
from capsight.kvcapsule.cache.layer import CapsuleLayer
from capsight.kvcapsule.cache.layered import LayeredCache
from capsight.kvcapsule.cache.reader import Reader, hand_over
from capsight.kvcapsule.cache.steps import Steps
from capsight.kvcapsule.codecs import BlockCodec
from capsight.layout import PromptLayout


class CapsuleCache(LayeredCache):
    """Hand it to `model.generate(**inputs, past_key_values=cache)`; nothing of the model is patched.

    Prefill sees full keys and values; what comes later attends to capsules of the images, which
    each layer rebuilds into one shared scratch buffer (`materialise`), or leaves to an attention
    function that reads them as they are (`latent`). Text, delimiters, block tails and generated
    tokens are exact. Sliding-window layers hold exact tokens.
    The capsule scheme is that of KVCapsule (arXiv 2605.16439); codecs and storage are our own.

    Attributes:
        honours_key_bias: to be set by whoever calls `update` without a model and adds `key_bias` itself.
        lean: whether attention had better read what is kept alone, wherever it can.
        steps: what it has while its steps may be compiled, else None.
        fitted_to: fingerprint of the model that the codecs were fitted to; "" where they fit any.
        adapters: that of the PEFT adapters which the model reads it with; "" where there are none.
    """

    lean = False
    fitted_to = ""
    adapters = ""

    def __init__(
        self, codecs: Mapping[int, BlockCodec], layout: PromptLayout, config: PreTrainedConfig
    ) -> None:
        """Make an empty cache for one batch of prompts.

        Args:
            codecs: codec of every full-attention layer, by layer index; all of one block size.
            layout: where the images lie in the prompt.
            config: the model's config.

        Raises:
            ModelMismatchError: the codecs are not those of the full-attention layers of `config`.
        """
        super().__init__(codecs, layout, config)
        self._leaves: tuple[int | None] | None = None  # tokens from which on capsules may be left, if told
        self._reader = Reader(config)
        self._leaving = False  # whether the step that is open leaves capsules, as far as it has come
        self.honours_key_bias = False
        self.steps: Steps | None = None

    @property
    def is_compileable(self) -> bool:
        """Whether transformers may compile the steps; a `generate` that is asked to opens them."""
        return self.steps is not None

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """A cache of its own; codecs and the config are shared, as by all caches of a capsule."""
        memo |= {id(layer.codec): layer.codec for layer in self.capsule_layers.values()}
        memo |= {id(self._config): self._config, id(self.steps): None}
        other = memo[id(self)] = type(self).__new__(type(self))
        other.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return other

    def __copy__(self) -> Self:
        """The same: of two caches that share their layers, one would not know what the other has read."""
        return copy.deepcopy(self)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Add `[B, H, Q, D]` new tokens of one layer; returns `[B, H, S, D]`, see `CapsuleLayer`.

        Raises:
            LayoutError: the batch does not fit the layout.
            ModelMismatchError: what the cache holds is of another dtype.
            CapsightError: the codec rebuilds nothing and attention does not hide what is missing.
        """
        if self.steps is not None and torch.compiler.is_dynamo_compiling():
            return self.steps.hand_over(key_states, value_states, layer_idx)
        layer = self.layers[layer_idx]
        if self._open and self._leaving and isinstance(layer, CapsuleLayer):
            self._reader.check_read()
            if key_states.shape[2] == 1 and layer.grow(key_states, value_states):
                self._open = layer_idx < self._last
                self._reader.expect(layer.codec.name)
                hand_over(key_states, value_states, self)
                return key_states, value_states
        if not self._open:
            self._leaving = False
            self._reader.look()
            self._fit_batch(key_states.shape[0])
            self.check_dtype(key_states.dtype)
            if key_states.shape[2] == 1:
                self.check_finite()
        if key_states.shape[2] > 1:
            total = key_states.sum(dtype=torch.float32) + value_states.sum(dtype=torch.float32)
            self._finite.append((layer_idx, total))
        value_states = value_states.to(key_states.dtype)  # autocast turns keys into float32
        self._open = layer_idx < self._last
        self._reader.check_read()
        if not isinstance(layer, CapsuleLayer):
            keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
            hand_over(keys, values, self)
            return keys, values
        payload = layer.payload
        hides = payload is not None and layer.codec.hides(payload)
        after = self._leaves[0] if self._leaves else (0 if self.lean and self._reader.is_ours else None)
        self._ledger.left = None
        self._ledger.latent = after is not None and layer.get_seq_length() >= after
        if (hides or (self._ledger.latent and payload is not None)) and not self.honours_key_bias:
            self._reader.check_known(layer.codec.name)
        keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if not self.honours_key_bias or self._ledger.left is not None:
            self._reader.expect(layer.codec.name if hides or self._ledger.left is not None else "")
        self._leaving = self._ledger.left is not None
        hand_over(keys, values, self)
        return keys, values

    def step(
        self, query: Tensor, key: Tensor, value: Tensor, layer_idx: int, scaling: float
    ) -> Tensor | None:
        """`update` with one new token and attention of capsight's to all, in one go; see `CapsuleLayer.step`.

        Returns:
            `[B, 1, Hq, D]`; None, with nothing done, where more has to be done.
        """
        layer = self.layers[layer_idx]
        if self.steps is None or self._finite or not isinstance(layer, CapsuleLayer):
            return None
        out = layer.step(query, key, value, self.steps.mask, scaling)
        if out is not None:
            self._open = layer_idx < self._last
            self._reader.read()
        return out

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        """Logical length: tokens seen per row, padding included; a tensor while a graph is made."""
        if self.steps is not None and torch.compiler.is_dynamo_compiling():
            return self.steps.seen
        return super().get_seq_length(layer_idx)

    def check_dtype(self, dtype: torch.dtype) -> None:
        """Refuse keys of another dtype than those held.

        Raises:
            ModelMismatchError: there are some, and they are.
        """
        held = next(iter(self.capsule_layers.values()))
        if held.is_initialized and held.dtype != dtype:
            raise ModelMismatchError(
                f"the cache holds keys and values in {held.dtype}, the model runs in {dtype}; make a new "
                "cache, or run the model as before"
            )

    def key_bias(self, layer_idx: int) -> Tensor | None:
        """What attention has to add to its scores over the keys that `update` last returned for a layer.

        Returns:
            `[B, H or 1, 1, S]` in the keys' dtype (H the KV heads), `finfo.min` for evicted keys; None
            where there is nothing to add, as always with codecs that rebuild.
        """
        layer = self.layers[layer_idx]
        return layer.key_bias() if isinstance(layer, CapsuleLayer) else None

    @contextmanager
    def leaving_capsules(self, after: int | None = 0) -> Iterator[None]:
        """Inside the block, `update` may leave capsules to an attention function that calls `take_latent`.

        Args:
            after: tokens per row that the cache has to hold before it does; None: it never does.
        """
        before, self._leaves, self._leaving = self._leaves, (after,), False
        try:
            yield
        finally:
            self._leaves, self._ledger.left, self._leaving = before, None, False

    def watch(self, config: PreTrainedConfig) -> None:
        """Say that the model with this config goes on with the cache, be it another copy of the first one."""
        self._reader.watch(config)

    def attended(self) -> None:
        """Said by capsight's attention function: it hides what is hidden, and reads what is left."""
        self._reader.read()

    def take_latent(self) -> Callable[[Tensor, Tensor | None, float], Tensor] | None:
        """Attention over all that the last update left to it; None if `update` returned all tokens.

        Returns:
            A function of queries `[B, Hq, Q, D]`, a mask over all tokens (see `LayerTokens.attend`) and the
            factor of scores, which gives `[B, Q, Hq, D]`.
        """
        left, self._ledger.left = self._ledger.left, None
        if left is None:
            return None
        self._reader.read()
        tokens, held = left
        return lambda query, mask, scaling: tokens.attend(query, held, mask, scaling, self._ledger.scratch)

    def restore(self, length: int) -> None:
        """Go back to `length` tokens per row after a turn that was broken off; see `LayeredCache`."""
        self._reader.forget()
        super().restore(length)
