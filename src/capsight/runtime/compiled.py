"""Steps in a graph of `torch.compile`, for the call of `generate` that compiles those over a `StaticCache`.

Attention and all that the cache does with a new token are one operation of the graph (`Handed`). Where that
cannot be, a log line says why, once, and the steps run as they do without a graph.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import CompileConfig
from transformers.masking_utils import sdpa_mask

from capsight.cache_argument import cache_of
from capsight.kvcapsule import CapsuleCache
from capsight.kvcapsule.cache.layer import CapsuleLayer
from capsight.kvcapsule.cache.steps import Steps
from capsight.runtime.attention import capsight_attention
from capsight.runtime.decode import Decode
from capsight.runtime.options import asked

_ALL_SHOWN = torch.ones(1, 1, 1, 1, dtype=torch.bool)
_log = logging.getLogger("capsight")


def compiled_steps() -> CompileConfig:
    """What `generate` takes as `compile_config` to run decode steps in a graph of `torch.compile`.

    On CPUs, too, where a C++ compiler is needed. Over capsules that are read as they are, or over a
    `StaticCache`; over other caches nothing is compiled. A graph is made in the first steps of a batch size,
    which takes some ten seconds.

    Example:
        >>> with capsight.enable(model, capsule=capsule) as fast:
        ...     tokens = fast.generate(**inputs, compile_config=capsight.compiled_steps())
    """
    config: Any = CompileConfig(mode="default")
    config._compile_all_devices = True  # transformers compiles on GPUs unless told so
    return config


@contextmanager
def steps_compiled(model: Any, capsules: Any, decode: Decode, options: Mapping[str, Any]) -> Iterator[None]:
    """Inside the block the cache says that its steps can be compiled, if `generate` is asked to and they can.

    Args:
        model: the model that generates.
        capsules: the cache of the call.
        decode: how attention gets at capsules.
        options: what `generate` is given.
    """
    steps = None
    if isinstance(capsules, CapsuleCache):
        if _is_asked(model, options):
            reason = reason_against(model, capsules, decode, options)
            if reason:
                _say(reason)
            else:
                steps = Steps.of(capsules, _attention)
        capsules.steps = steps
    try:
        yield
    finally:
        if steps is not None:
            capsules.steps = None


def is_step(kwargs: dict[str, Any]) -> bool:
    """Whether a graph is made of a call of the model, with these keywords, that `generate` has prepared."""
    return torch.compiler.is_dynamo_compiling() and getattr(cache_of(kwargs), "steps", None) is not None


def steps_mask(steps: Steps, *args: Any, **kwargs: Any) -> Tensor:
    """Note what hides tokens from the next step, of transformers' description of a mask.

    Returns:
        What goes through the graph in the place of the mask, of one shape for all steps: nobody reads it.
    """
    kwargs["allow_is_causal_skip"] = not kwargs.get("use_vmap")
    steps.mask = sdpa_mask(*args, **kwargs)
    return _ALL_SHOWN


def _is_asked(model: Any, options: Mapping[str, Any]) -> bool:
    """Whether transformers would compile steps over a `StaticCache`."""
    own = model.generation_config
    config = asked(options, "compile_config") or own.compile_config
    if asked(options, "disable_compile") or own.disable_compile or config is None:
        return False
    return model.device.type != "cpu" or bool(config._compile_all_devices)


def reason_against(model: Any, capsules: Any, decode: Decode, options: Mapping[str, Any]) -> str:
    """Why steps over a cache of capsules cannot be compiled; empty if they can. See `steps_compiled`."""
    mask = options.get("attention_mask")
    if type(capsules) is not CapsuleCache:
        return f"{type(capsules).__name__} is no cache of a KVCapsule"
    if decode != "latent":
        return f"decode={decode!r} rebuilds keys and values"
    if not all(isinstance(layer, CapsuleLayer) for layer in capsules.layers):
        return "the model has layers with states or sliding windows"
    if model.device.type != "cpu":
        return f"the model is on {model.device.type}, and only steps on the CPU can be"
    if mask is not None and mask.ndim != 2:
        return "attention_mask is not of tokens"
    if asked(options, "prefill_chunk_size") or model.generation_config.prefill_chunk_size:
        return "prefill_chunk_size has the prompt compiled, too"
    return ""


@cache
def _say(reason: str) -> None:
    _log.warning("decode steps over capsules are not compiled: %s", reason)


def _attention(
    capsules: CapsuleCache, query: Tensor, key: Tensor, value: Tensor, layer: int, scaling: float
) -> Tensor:
    """Store a token and attend as without a graph; see `Attention`."""
    assert capsules.steps is not None
    groups = query.shape[1] // key.shape[1]
    module: Any = SimpleNamespace(layer_idx=layer, num_key_value_groups=groups, is_causal=True)
    key, value = capsules.update(key, value, layer)
    return capsight_attention(module, query, key, value, capsules.steps.mask, scaling=scaling)[0]
