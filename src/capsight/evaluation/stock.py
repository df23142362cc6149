"""What decoding over capsules is compared with: the caches of transformers, and decode steps in a graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

from transformers import DynamicCache, StaticCache

from capsight.cache_argument import CACHE
from capsight.runtime import FastModel, compiled_steps
from capsight.runtime.compiled import reason_against

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
    from torch._dynamo.exc import TorchDynamoException  # torch.compile is imported by those who need it

    options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True}
    try:
        cache = model.generate(**inputs, **options)[CACHE]
    except TorchDynamoException as error:
        return str(error).strip().partition("\n")[0]
    fast = model.fast
    if fast.capsule is not None:
        return reason_against(fast.model, cache, fast.decode, inputs)
    return "" if cache.is_compileable else f"{type(cache).__name__} of this model cannot be"
