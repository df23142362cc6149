"""Sparse attention: one signature, three implementations, and the choice between them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, get_args

from torch import Tensor

from capsight.blindsight.attention import auto, reference, segments
from capsight.blindsight.attention.work import Attend, Work, attend_all, check, chunk_of
from capsight.blindsight.categories import Category, MaskOptions
from capsight.blindsight.rule import CAUSAL, BaseRule
from capsight.errors import OptionError
from capsight.execution import own_precision
from capsight.layout import PromptLayout

Implementation = Literal["auto", "reference", "segments", "flex"]
"""How sparse attention is computed; they agree within float error."""


def sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: PromptLayout,
    categories: Sequence[Category],
    *,
    options: MaskOptions | None = None,
    rule: BaseRule = CAUSAL,
    scaling: float | None = None,
    prefix: int | None = None,
    implementation: Implementation = "auto",
) -> Tensor:
    """Attention of one layer in which every head follows its category; queries are the last S tokens.

    Args:
        query: `[B, Hq, S, D]`, after RoPE, float32, bfloat16 or float16.
        key: `[B, Hkv, T, D]`, after RoPE, T >= S: cached keys (if any), then those of the queries.
        value: `[B, Hkv, T, D]`.
        layout: of the prompts from their first token (left padding included) at least up to the last
            query. What comes later is ignored, so a chunk of a prefill may be given the whole prompt's.
        categories: one per query head of this layer (`head_map.categories[layer]`).
        options: which tokens are sinks (`head_map.options`).
        rule: the layer's own (`BaseRule.of(config, sliding_window)`).
        scaling: factor on the scores; None: 1 / sqrt(D).
        prefix: tokens before the first query; None: T - S. To be given where the cache has dropped old
            keys (a sliding layer's): the keys are then the last T positions.
        implementation: see `Implementation`.

    Returns:
        `[B, Hq, S, D]`, rows of padding zero. No gradient flows through "flex".

    Raises:
        OptionError: shapes do not belong together, or the implementation is unknown.
        LayoutError: the layout has other rows or ends too early, or images interleave.
        FlexUnavailableError: "flex" was asked for and cannot be compiled here.
    """
    check(query, key, value, layout, len(categories))
    chunk = chunk_of(layout, query.shape[2], key.shape[2], prefix)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    choose = _chooser(implementation)
    with own_precision(query.device):
        return attend_all(
            query,
            key.to(query.dtype),  # autocast gives values in another one
            value.to(query.dtype),
            layout,
            categories,
            options or MaskOptions(),
            rule,
            chunk,
            scale,
            choose,
        )


def _chooser(implementation: str) -> Callable[[Work, Tensor], Attend]:
    if implementation == "auto":
        return auto.choose
    if implementation == "flex":
        from capsight.blindsight.attention import flex  # torch.compile is imported by those who need it

        return lambda work, query: flex.attend
    if implementation == "reference":
        return lambda work, query: reference.attend
    if implementation == "segments":
        return lambda work, query: segments.attend
    raise OptionError(f"implementation must be one of {get_args(Implementation)}, not {implementation!r}")


__all__ = ["Implementation", "sparse_attention"]
