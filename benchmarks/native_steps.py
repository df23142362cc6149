"""Steps of one layer in native code, as `decode_attention.py` times them."""

from __future__ import annotations

import torch
from attention_measuring import Run
from torch import Tensor

from capsight.kvcapsule.attention import BlockRows
from capsight.kvcapsule.attention.native import OneToken, Source, Sources
from capsight.kvcapsule.codecs import AdaptiveCodec, HeadsCodec, Payload, QuantisedCodec
from capsight.kvcapsule.codecs.quantise import BITS

Pair = tuple[Tensor, Tensor]
"""Keys and values `[B, H, S, D]`."""


def native_runs(
    codec: AdaptiveCodec | HeadsCodec,
    payload: Payload,
    rows: BlockRows,
    exact: Pair,
    full: Pair,
    query: Tensor,
    steps: int,
) -> dict[str, Run]:
    """So many steps over kept tokens in 16, 8 and 4 bits with the exact ones, and over the full cache."""
    keys, values = (x[:, :, -1:].contiguous() for x in exact)

    def step(tail: Pair, *kept: Source) -> Run:
        batch, kv_heads, held, head_dim = tail[0].shape
        one = OneToken(
            query, (batch, held + steps, kv_heads, head_dim), Sources((*kept, dense(*tail, steps)))
        )

        def run() -> Tensor:
            out = one(query, keys, values, held, head_dim**-0.5)
            assert out is not None
            return out

        return run

    runs = {"native, full": step(full)}
    for bits in (None, *BITS):
        stored = codec if bits is None else QuantisedCodec(codec, bits)
        closed = payload if bits is None else stored.closed(payload)
        found = stored.source(closed, rows, len(query))
        assert found is not None
        runs["native" if bits is None else f"native, int{bits}"] = step(exact, found)
    return runs


def dense(keys: Tensor, values: Tensor, room: int) -> Source:
    """Keys and values `[B, H, S, D]` of which every row and head has S, with room for more behind each."""
    batch, heads, held, _ = keys.shape
    starts = torch.arange(batch * heads).view(batch, heads) * (held + room)
    keys, values = (
        torch.nn.functional.pad(x, (0, 0, 0, room)).flatten(0, 2)[:, None] for x in (keys, values)
    )
    return Source(keys, values, starts, torch.full_like(starts, held))
