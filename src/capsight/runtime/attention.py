"""capsight's attention function, registered with transformers under its own name.

It is the stock SDPA attention, with what the runtime state adds to it: the key bias of a cache that has
evicted tokens, queries for a cache that chooses by them, and capsules that are read as they are. `enable`
installs it for the text model while it is needed; for calls that concern no cache of capsight's it is SDPA
attention, so `model.set_attn_implementation("capsight")` can as well be said once and for all.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from capsight.errors import UnsupportedModelError
from capsight.kvcapsule import QueryObserver
from capsight.kvcapsule.cache.reader import ATTENTION_NAME, taken_over
from capsight.kvcapsule.cache.steps import Handed
from capsight.runtime.state import current_state


def capsight_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer, with transformers' signature.

    Args:
        module: the attention module; its `layer_idx` names the layer.
        query: `[B, Hq, Q, D]`.
        key: `[B, Hkv, S, D]`; new tokens only where the cache leaves all it has.
        value: likewise.
        attention_mask: bool or additive `[B, 1, Q, S]`; None means causal.
        **kwargs: passed on to SDPA attention (`scaling`, `dropout`...).

    Returns:
        Output `[B, Q, Hq, D]`, and None for the weights.

    Raises:
        UnsupportedModelError: scores are capped or have sinks, or the model changes keys or values between
            its cache and its attention, and capsules are to be read as they are.
    """
    if kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None:
        raise UnsupportedModelError(
            f"{type(module).__name__} caps its scores or has sinks, which capsight's attention knows nothing "
            "of; leave the model its own"
        )
    scaling = kwargs.get("scaling")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if isinstance(key, Handed):  # a graph is made
        return key.attend(query, scaling), None
    state, (cache, as_given, unchanged) = current_state(), taken_over(key, value)
    if as_given:
        cache.attended()
    elif cache is not state.cache:  # what a pass that was broken off has left
        cache = None
    layer = getattr(module, "layer_idx", None)
    if layer is None or (cache is None and state.prefill is None):  # a vision tower, or nothing of ours
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)[0], None
    if cache is not None and cache.steps is not None and query.shape[2] == 1:
        attention_mask = cache.steps.mask
    left = None if cache is None else cache.take_latent()
    if left is not None:
        if not unchanged:
            raise UnsupportedModelError(
                f"{type(module).__name__} changes keys or values after the cache has given them, so capsules "
                "cannot be read as they are; use decode='materialise', with a joint or adaptive capsule"
            )
        return left(query, attention_mask, scaling), None
    bias = None if cache is None else cache.key_bias(layer)
    if bias is not None:
        attention_mask = _with_bias(attention_mask, bias, query, key)
    if isinstance(cache, QueryObserver):
        cache.observe(layer, query, key, attention_mask, scaling)
    if state.prefill is not None and bias is None:
        sparse = state.prefill.attend(layer, query, key, value, scaling, kwargs.get("sliding_window"))
        if sparse is not None:
            return sparse, None
    output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    return output, None


def _with_bias(mask: Tensor | None, bias: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """Add `bias` `[B, 1 or H, 1, S]` to a mask, made causal where there is none: `[B, 1 or Hq, Q, S]`."""
    if bias.shape[1] > 1:
        bias = bias.repeat_interleave(query.shape[1] // bias.shape[1], 1)
    if mask is None:
        q, s = query.shape[2], key.shape[2]
        mask = torch.ones(q, s, dtype=torch.bool, device=query.device).tril(s - q)
    if mask.dtype == torch.bool:
        return torch.where(mask, bias, torch.finfo(query.dtype).min)
    return mask + bias


AttentionInterface.register(ATTENTION_NAME, capsight_attention)
