"""Runs a model with its text attention handed to an observer, and leaves the model as it was.

Nothing is patched: the attention function is registered with transformers under a name of its own and
chosen for the text model while the context lasts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from capsight.attention_swap import swapped_attention
from capsight.blindsight.attention import Implementation, sparse_attention
from capsight.blindsight.categories import Category, MaskOptions
from capsight.blindsight.head_map import HeadMap
from capsight.blindsight.rule import BaseRule
from capsight.errors import UnsupportedModelError
from capsight.layout import PromptLayout

ATTENTION_NAME = "capsight_calibrate"


@dataclass(frozen=True, slots=True, eq=False)
class LayerCall:
    """What the attention of one layer was called with.

    Attributes:
        module: the attention module.
        layer: its index.
        query: `[B, Hq, S, D]`, after RoPE.
        key: `[B, Hkv, S, D]`, after RoPE.
        value: `[B, Hkv, S, D]`.
        rule: the layer's own.
        scaling: factor on the scores.
    """

    module: Any
    layer: int
    query: Tensor
    key: Tensor
    value: Tensor
    rule: BaseRule
    scaling: float

    def attend(
        self,
        layout: PromptLayout,
        categories: Sequence[Category],
        options: MaskOptions,
        prefix: int | None = None,
        implementation: Implementation = "auto",
    ) -> Tensor:
        """Attention of this layer with a category per query head: `[B, Hq, S, D]`."""
        return sparse_attention(
            self.query,
            self.key,
            self.value,
            layout,
            categories,
            options=options,
            rule=self.rule,
            scaling=self.scaling,
            prefix=prefix,
            implementation=implementation,
        )

    def attend_uniform(
        self,
        layout: PromptLayout,
        category: Category,
        options: MaskOptions,
        prefix: int | None = None,
        implementation: Implementation = "auto",
    ) -> Tensor:
        """Attention of this layer if all of its heads were of one category: `[B, Hq, S, D]`."""
        return self.attend(layout, (category,) * self.query.shape[1], options, prefix, implementation)


Observer = Callable[[LayerCall], Tensor]
"""Sees a layer's call and answers with its output `[B, Hq, S, D]`."""

_WATCH: ContextVar[tuple[Observer, Any]] = ContextVar("capsight_calibration")


@contextmanager
def untouched(model: Any) -> Iterator[None]:
    """Inside the context a model may be run in eval mode, without gradients.

    Whatever happens, it leaves with the training flags and position state it came with.
    """
    training = [module for module in model.modules() if module.training]
    deltas = [(module, module.rope_deltas) for module in model.modules() if hasattr(module, "rope_deltas")]
    try:
        model.eval()
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True
        for module, delta in deltas:
            module.rope_deltas = delta


@contextmanager
def watching(model: Any, observer: Observer) -> Iterator[None]:
    """`untouched`, and `observer` is the attention of the model's text layers.

    Args:
        model: a transformers vision-language model.
        observer: called once per layer and forward pass.
    """
    token = _WATCH.set((observer, model.config))
    try:
        with untouched(model), swapped_attention(model, ATTENTION_NAME, _attention, _no_mask):
            yield
    finally:
        _WATCH.reset(token)


def following(layout: PromptLayout, head_map: HeadMap, prefix: int | None = None) -> Observer:
    """The observer that runs a model with a head map; `prefix` tokens are in its cache already."""
    return lambda call: call.attend(layout, head_map.categories[call.layer], head_map.options, prefix)


def shape_of(model: Any) -> tuple[int, int]:
    """Layers and query heads of a model's text part."""
    text = model.config.get_text_config(decoder=True)
    return int(text.num_hidden_layers), int(text.num_attention_heads)


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """transformers' attention signature: returns `[B, S, Hq, D]` and no weights."""
    observer, config = _WATCH.get()
    if kwargs.get("softcap") is not None:
        raise UnsupportedModelError("this model caps its attention scores (softcap); that has no sparse form")
    scaling = kwargs.get("scaling") or query.shape[-1] ** -0.5
    rule = BaseRule.of(config, kwargs.get("sliding_window"))
    call = LayerCall(module, int(module.layer_idx), query, key, value, rule, scaling)
    return observer(call).transpose(1, 2).contiguous(), None


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """No S x S tensor: the mask follows from the layout."""
