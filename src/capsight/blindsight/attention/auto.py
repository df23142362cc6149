"""Which implementation to take for some work, by length and device."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from capsight.blindsight.attention import segments
from capsight.blindsight.attention.work import Attend, Work
from capsight.blindsight.categories import Category
from capsight.blindsight.rule import CAUSAL

FLEX_FROM: dict[str, int] = {"cpu": 4096, "cuda": 4096}
"""Device type -> keys from which FlexAttention is worth its compilation (4-16 s on a CPU) and its gathers.

`benchmarks/prefill_attention.py` measures both sides. On 2 CPU cores a FlexAttention kernel over a mask
like ours took 97 ms at 4k tokens where dense causal SDPA took 308 and an SDPA loop over images 367.
"""

_WITHOUT_FLEX: set[tuple[str, torch.dtype]] = set()
"""Device types and dtypes for which compiling has failed in this process."""

FEW_ROWS = 256
"""Below so many queries (decoding, the question after a cached prompt) segments make one or two calls."""


def choose(work: Work, query: Tensor) -> Attend:
    """The implementation that is expected to be fastest.

    Dense heads under a causal rule are one plain causal SDPA call in `segments`, so they always go
    there, unless a cached prefix makes them a masked one.

    Args:
        work: what is to be attended to.
        query: `[H, S, D]`.
    """
    keys, rows = work.chunk.end - work.chunk.first_key, query.shape[1]
    plain = work.category is Category.DENSE and work.rule == CAUSAL and rows == keys
    kind = (query.device.type, query.dtype)
    short = rows < FEW_ROWS or keys < FLEX_FROM.get(query.device.type, keys + 1)
    return segments.attend if plain or short or kind in _WITHOUT_FLEX else _flex_or_segments


def _flex_or_segments(query: Tensor, key: Tensor, value: Tensor, work: Work, scaling: float) -> Tensor:
    """Flex; where it cannot be compiled, segments from then on, and a warning."""
    from capsight.blindsight.attention import flex  # torch.compile is imported by those who need it

    try:
        return flex.attend(query, key, value, work, scaling)
    except flex.FlexUnavailableError as error:
        _WITHOUT_FLEX.add((query.device.type, query.dtype))
        message = f"sparse attention runs in segments, slower at this length: {error}"
        warnings.warn(message, RuntimeWarning, stacklevel=2)
        return segments.attend(query, key, value, work, scaling)
