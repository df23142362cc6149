"""Attention of few queries over ragged pieces of tokens: the native call, and the same in plain torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from capsight.kvcapsule.attention.native.build import library, missing
from capsight.kvcapsule.attention.native.source import FORMATS, Source, Sources

Attended = tuple[Tensor, Tensor]


def supports(query: Tensor) -> bool:
    """Whether `decode_attention` runs natively for such queries; compiles at the first call that may."""
    if not query.is_cpu or query.dtype not in FORMATS or (query.requires_grad and torch.is_grad_enabled()):
        return False
    return not missing()


def decode_attention(query: Tensor, sources: Sequence[Source] | Sources, scaling: float) -> Attended:
    """Attention over the pieces of all sources together.

    Scores and sums are float32. Bfloat16 queries are multiplied in bfloat16 where the processor can: exactly
    with tokens in bfloat16; with levels (AMX) as integers of 22 bits, in steps of a query's largest channel.
    Probabilities are rounded to bfloat16, or to 15 bits. A channel of a value that is no finite number may
    take its neighbour, with which it is multiplied (AMX), with it.

    Args:
        query: `[B, Hq, Q, D]`, float32, bfloat16 or float16; Hq is a multiple of H. For few queries: tokens
            are read again for every eight queries of a KV head.
        sources: what is read.
        scaling: factor of the scores.

    Returns:
        `[B, Hq, Q, D]` in the dtype of `query`, 0 where nothing is seen; and float32 `[B, Hq, Q]`, the log of
        the normaliser, minus infinity there.
    """
    together = sources if isinstance(sources, Sources) else Sources(tuple(sources))
    if torch.compiler.is_compiling():
        tensors, numbers = [], []
        for source in together.each:
            tensors += [query.new_empty(0) if x is None else x for x in source.tensors]
            numbers += source.numbers
        return _decode_attention(query, tensors, numbers, scaling)
    return _run(query, together, scaling)


def attended(query: Tensor, sources: Sources, scaling: float) -> Tensor:
    """`decode_attention` as models take it, `[B, Q, Hq, D]`, and without the normaliser."""
    if torch.compiler.is_compiling():
        return decode_attention(query, sources, scaling)[0].transpose(1, 2)
    out, by_token = room_for(query)
    _call(query.contiguous(), sources, scaling, out, None)
    return by_token


def room_for(query: Tensor) -> tuple[Tensor, Tensor]:
    """What native code writes `[B, Hq, Q, D]` to, contiguous, and the same as `[B, Q, Hq, D]`."""
    batch, heads, count, size = query.shape
    if count == 1:
        out = torch.empty((batch, 1, heads, size), dtype=query.dtype)
        return out, out
    out = torch.empty((batch, heads, count, size), dtype=query.dtype)
    return out, out.transpose(1, 2)


def append(source: Source, keys: Tensor, values: Tensor) -> None:
    """Put a new token of every row and KV head behind those of a source, where `supports` them.

    Args:
        source: its pieces have room for one more; what lies behind them is overwritten, and `counts` grow.
        keys: `[B, H, 1, D]`, in the dtype of the source's.
        values: likewise.
    """
    keys, values = keys.contiguous(), values.contiguous()
    bytes_of_one = keys.shape[3] * keys.element_size()
    pointers = keys.data_ptr(), values.data_ptr()
    library().capsight_append(source.address, *pointers, *keys.shape[:2], bytes_of_one)


def _run(query: Tensor, sources: Sources, scaling: float, level: str | None = None) -> Attended:
    query = query.contiguous()
    out, lse = torch.empty_like(query), query.new_empty(query.shape[:3], dtype=torch.float32)
    _call(query, sources, scaling, out, lse, level)
    return out, lse


def _call(
    query: Tensor, sources: Sources, scaling: float, out: Tensor, lse: Tensor | None, level: str | None = None
) -> None:
    batch, heads = sources.each[0].starts.shape
    library(level).capsight_decode(
        query.data_ptr(),
        FORMATS[query.dtype],
        batch,
        heads,
        query.shape[1] // heads * query.shape[2],
        query.shape[3],
        sources.native,
        len(sources.each),
        scaling,
        torch.get_num_threads(),
        out.data_ptr(),
        None if lse is None else lse.data_ptr(),
    )


@torch.library.custom_op("capsight::decode_attention", mutates_args=())
def _decode_attention(
    query: Tensor, tensors: list[Tensor], numbers: list[int], scaling: float
) -> tuple[Tensor, Tensor]:
    """`decode_attention` as one operation of a compiled graph."""
    each = len(tensors) // (len(numbers) // 3)
    starts = range(0, len(tensors), each)
    parts = (Source.of(tensors[i : i + each], numbers[3 * n : 3 * n + 3]) for n, i in enumerate(starts))
    return _run(query, Sources(tuple(parts)), scaling)


@_decode_attention.register_fake
def _(query: Tensor, tensors: list[Tensor], numbers: list[int], scaling: float) -> tuple[Tensor, Tensor]:
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    return out, query.new_empty(query.shape[:3], dtype=torch.float32)
