"""Takes the implementation that was measured to be the fastest for some work."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from capsight.blindsight.attention import segments
from capsight.blindsight.attention.choice import fastest, kind_of
from capsight.blindsight.attention.work import Attend, Work

FEW_ROWS = 256
"""Below this many queries (decoding, the question after a cached prompt) segments make one or two calls."""

_WITHOUT_FLEX: set[tuple[str, torch.dtype]] = set()
"""Device types and dtypes for which compiling has failed in this process."""


def choose(work: Work, query: Tensor) -> Attend:
    """The implementation that is expected to be fastest.

    Args:
        work: what is to be attended to.
        query: `[N, G, S, D]`.
    """
    keys = work.chunk.end - work.chunk.first_key
    name = fastest(query.device, query.dtype, kind_of(work), keys)
    if name == "segments_float32":
        return in_float32
    few = query.shape[2] < FEW_ROWS or (query.device.type, query.dtype) in _WITHOUT_FLEX
    return flex_or_segments if name == "flex" and not few else segments.attend


def in_float32(query: Tensor, key: Tensor, value: Tensor, work: Work, scaling: float) -> Tensor:
    """Segments, computed in float32: faster than bfloat16 on CPUs whose kernels have to convert anyway."""
    q, k, v = (x.float() for x in (query, key, value))
    return segments.attend(q, k, v, work, scaling).to(query.dtype)


def flex_or_segments(query: Tensor, key: Tensor, value: Tensor, work: Work, scaling: float) -> Tensor:
    """Flex; where it cannot be compiled, segments from then on, and a warning."""
    from capsight.blindsight.attention import flex  # torch.compile is imported by those who need it

    try:
        return flex.attend(query, key, value, work, scaling)
    except flex.FlexUnavailableError as error:
        _WITHOUT_FLEX.add((query.device.type, query.dtype))
        message = f"sparse attention runs in segments, slower at this length: {error}"
        warnings.warn(message, RuntimeWarning, stacklevel=2)
        return segments.attend(query, key, value, work, scaling)
