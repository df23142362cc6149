"""What capsules are compared with in decoding: the caches that come with transformers."""

from __future__ import annotations

from typing import Any

from transformers import CompileConfig, DynamicCache, StaticCache

GRAPH = ", compiled"
"""Ends the name of a cache whose decode steps run in a graph of `torch.compile`, with inductor's kernels."""

COMPILED = "StaticCache" + GRAPH
STOCK = "DynamicCache", "StaticCache", COMPILED
"""By name."""


def stock_cache(name: str, config: Any, room: int) -> Any:
    """An empty cache; a static one has room for so many tokens a row."""
    return (
        DynamicCache(config=config)
        if name == "DynamicCache"
        else StaticCache(config=config, max_cache_len=room)
    )


def options_of(name: str) -> dict[str, Any]:
    """What `generate` has to be told over a cache of that name."""
    if not name.endswith(GRAPH):
        return {"disable_compile": True}
    compiled = CompileConfig(mode="default")
    compiled._compile_all_devices = True  # transformers compiles on GPUs unless told so
    return {"compile_config": compiled}
