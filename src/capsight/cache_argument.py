"""What transformers calls the argument, and the output, that is a cache: `past_key_values` before 5.24."""

from __future__ import annotations

import inspect
from typing import Any

from transformers import GenerationMixin

CACHE = (
    "cache"
    if "cache" in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
    else "past_key_values"
)
"""The keyword of models, of `generate` and of their outputs."""


def cache_of(kwargs: dict[str, Any]) -> Any:
    """The cache among the keywords of a model's call, however it is spelled."""
    cache = kwargs.get("cache")
    return kwargs.get("past_key_values") if cache is None else cache


def with_cache(kwargs: dict[str, Any], cache: Any) -> dict[str, Any]:
    """The keywords with another cache."""
    return {k: v for k, v in kwargs.items() if k not in ("cache", "past_key_values")} | {CACHE: cache}
