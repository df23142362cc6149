"""One prefill, recorded: the caches of all methods are filled from it, and the model runs once for all."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, cast
from weakref import WeakSet

from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from capsight.attention_swap import attention_fits
from capsight.blindsight import HeadMap
from capsight.cache_argument import CACHE
from capsight.kvcapsule import CacheMethod, CapsuleCache, ContextRepeater, LatentMethod, QueryObserver
from capsight.kvcapsule.cache.reader import hand_over
from capsight.kvcapsule.cache.stock import has_states, set_state, states
from capsight.layout import PromptLayout, build_layout
from capsight.layout.positions import text_position_ids
from capsight.runtime.prefill import SparsePrefill
from capsight.runtime.repeat import ContextRepeat
from capsight.runtime.split import TOKEN_ENTRIES, sequence_length
from capsight.runtime.state import RuntimeState, running


class _Recorder(DynamicCache):
    """A stock cache that holds everything: it has no sliding layers.

    To capsight's attention function it is a capsule cache without capsules.
    """

    steps: None = None
    """Its steps are never compiled."""

    def __init__(self, config: Any) -> None:
        super().__init__(config=config)
        stock: list[Any] = self.layers
        self.layers = [layer if has_states(layer) else DynamicLayer() for layer in stock]

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        hand_over(keys, values, self)
        return keys, values

    def attended(self) -> None:
        """Nothing is hidden."""

    def key_bias(self, layer_idx: int) -> None:
        """Nothing is hidden."""
        return

    def take_latent(self) -> None:
        """Nothing is left to attention."""
        return


class _ObservingRecorder(_Recorder):
    """A recorder that also keeps what a `QueryObserver` is shown."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.shown: dict[int, tuple[Tensor, Tensor | None, float]] = {}

    def observe(
        self, layer_idx: int, query: Tensor, key: Tensor, attention_mask: Tensor | None, scaling: float
    ) -> None:
        self.shown[layer_idx] = (query, attention_mask, scaling)


@dataclass(frozen=True, slots=True, eq=False)
class Prefill:
    """What a model computed from a batch of prompts.

    Attributes:
        model: the model, inside `enable`.
        tokens: the token entries of the prompts, `[B, S]` each.
        layout: of the prompts.
        first_logits: `[B, V]` float32, of the token that comes next.
    """

    model: Any
    tokens: dict[str, Tensor]
    layout: PromptLayout
    first_logits: Tensor
    _recorder: _Recorder
    _repeat: ContextRepeat
    _lean: WeakSet[Any] = field(default_factory=WeakSet)  # caches whose capsules attention reads as they are
    _read: dict[Any, Any] = field(default_factory=dict)  # what second readings showed, by kind of method

    @classmethod
    def record(
        cls, model: Any, inputs: Mapping[str, Any], head_map: HeadMap | None, observe: bool
    ) -> Prefill:
        """Run the model over prompts.

        Args:
            model: the model inside `enable`, where that runs capsight's attention if a method or the head
                map needs it.
            inputs: processor outputs.
            head_map: what the prefill follows; None is dense.
            observe: whether queries are kept for methods that choose by them.
        """
        layout = build_layout(inputs, model.config)
        sparse = (
            None
            if head_map is None
            else SparsePrefill(head_map, layout, model.config, seen=0, new=sequence_length(inputs))
        )
        recorder = (_ObservingRecorder if observe else _Recorder)(model.config)
        repeat = ContextRepeat(model)
        state = RuntimeState(cast(CapsuleCache, recorder), sparse, generating=True)
        with running(state), repeat.recording():
            output = model.generate(
                **inputs,
                **{CACHE: recorder},
                max_new_tokens=1,
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
            )
        layers: list[Any] = recorder.layers
        for layer in layers:
            # A stock layer has its heads one after another; the model gave their tokens so, side by side.
            if not has_states(layer):
                layer.keys, layer.values = (_token_major(x) for x in (layer.keys, layer.values))
        tokens = {key: value for key, value in inputs.items() if key in TOKEN_ENTRIES}
        return cls(model, tokens, layout, output.logits[0].float(), recorder, repeat)

    def cache(self, method: CacheMethod | None) -> Any:
        """A cache of a method (None: the stock cache) as it is after this prefill.

        Layer by layer it gets what the model would have given it; only methods that read the context
        twice make the model run, for their second reading.
        """
        config = self.model.config
        cache: Any = DynamicCache(config=config) if method is None else method.cache(self.layout, config)
        if isinstance(cache, CapsuleCache):
            cache.honours_key_bias = True
        layers: list[Any] = self._recorder.layers
        observes = isinstance(cache, QueryObserver)
        for index, layer in enumerate(layers):
            if has_states(layer):
                for kind, number, state in states(layer):
                    set_state(cache.layers[index], kind, number, state)
                continue
            cache.update(layer.keys, layer.values, index)
            if observes:
                assert isinstance(self._recorder, _ObservingRecorder)
                query, mask, scaling = self._recorder.shown[index]
                cache.observe(index, query, layer.keys, mask, scaling)
        if isinstance(cache, ContextRepeater):
            alike = type(method), getattr(method, "block_size", None)
            self._read[alike] = cache.repeat_context(self._read_again, self._read.get(alike))
        if isinstance(method, LatentMethod) and not method.rebuilds and attention_fits(self.model):
            self._lean.add(cache)
        return cache

    def copied(self, cache: Any) -> Any:
        """A copy of a cache that was filled from this prefill, read in the same way."""
        other = copy.deepcopy(cache)
        if cache in self._lean:
            self._lean.add(other)
        return other

    def generate(self, cache: Any, rows: Tensor | None = None, **inputs: Any) -> Any:
        """Go on from a cache that was filled from this prefill, as `model.generate` does.

        Args:
            cache: the cache.
            rows: which rows of this prefill the cache's are, int64 `[B']`; None: all, or all of one.
            **inputs: token entries of everything so far, and generation options.
        """
        layout, ids = self.layout, inputs["input_ids"]
        if rows is not None and layout.batch_size > 1:
            layout = layout.select(rows.tolist())
        layout = layout.repeat(len(ids) // layout.batch_size)
        mask = inputs.get("attention_mask", ids.new_ones(ids.shape))
        positions = text_position_ids(layout, self.model.config, mask)
        if positions is not None:
            inputs["position_ids"] = positions.to(ids.device)
        lean = cache.leaving_capsules() if cache in self._lean else nullcontext()
        state = RuntimeState(cache if isinstance(cache, CapsuleCache) else None, generating=True)
        with running(state), lean:
            return self.model.generate(**{CACHE: cache}, **inputs)

    def _read_again(self, copy: Any) -> None:
        self._repeat.read(copy, self.tokens)


def observes(method: CacheMethod, layout: PromptLayout, config: Any) -> bool:
    """Whether a method has to be shown queries."""
    return isinstance(method.cache(layout, config), QueryObserver)


def _token_major(x: Tensor) -> Tensor:
    """`[B, H, S, D]` as a view of `[B, S, H, D]`, as projections leave it."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)
