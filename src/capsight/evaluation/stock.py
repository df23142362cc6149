"""What decoding over capsules is compared with: the caches of transformers, and decode steps in a graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

from torch._dynamo.exc import TorchDynamoException
from transformers import DynamicCache, StaticCache

from capsight.runtime import FastModel, compiled_steps

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
    return {"compile_config": compiled_steps()} if name.endswith(GRAPH) else {"disable_compile": True}


@dataclass(frozen=True, slots=True)
class Compiled:
    """A model that decodes in a graph: over capsules, or over a `StaticCache` where there are none.

    Attributes:
        fast: the model.
        room: tokens a row that a static cache holds.
    """

    fast: FastModel
    room: int

    def generate(self, **options: Any) -> Any:
        """As the model's own `generate`."""
        if self.fast.capsule is None and "past_key_values" not in options:
            options["past_key_values"] = stock_cache(COMPILED, self.fast.model.config, self.room)
        return self.fast.generate(**options, **options_of(COMPILED))


@contextmanager
def compiled(enabled: Callable[[], AbstractContextManager[FastModel]], room: int) -> Iterator[Compiled]:
    """What `enabled` enters, with compiled steps."""
    with enabled() as fast:
        yield Compiled(fast, room)


def why_not_compiled(model: Compiled, inputs: Mapping[str, Any]) -> str:
    """Compile decode steps, which may take a minute; why that cannot be here, empty if it can."""
    try:
        model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    except TorchDynamoException as error:
        return str(error).strip().partition("\n")[0]
    return ""
