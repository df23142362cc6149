"""Time of one decode step's attention over capsules (`latent`) against SDPA on the full cache; one layer.

    python benchmarks/decode_attention.py --json benchmarks/results/decode_attention.json

Every row of the batch has so many vision tokens in capsules, some exact text tokens and one new token. The
full cache holds what the capsules stand for, so both outputs must agree; by how much they differ is reported.
The baseline is SDPA as transformers calls it (`enable_gqa`) and SDPA with the query heads of a KV head as
its rows, which reads each key once; speedup is over the faster of the two, measured in the same run, all
taking turns. Making the latent form of a capsule from what the cache stores is part of each latent run.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from attention_measuring import TEXT_TOKENS, Run, machine, measure
from rich.console import Console
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from capsight.kvcapsule.codecs import AdaptiveCodec, Payload
from capsight.kvcapsule.latent import BlockRows, latent_attention
from capsight.kvcapsule.latent.choice import Kind, reason_against
from capsight.kvcapsule.moments import LayerMoments

BLOCK = 64
DISTINCT = 64
"""Blocks that are encoded; the cache repeats them."""

COPIES = 4
"""Full caches' worth of memory that a size takes at most while it is made and measured."""


class Shape(NamedTuple):
    """Query heads, KV heads, channels."""

    heads: int
    kv_heads: int
    head_dim: int


class Cache(NamedTuple):
    """One layer of a batch: full keys and values `[B, H, S, D]`, and the same as capsules."""

    full: tuple[Tensor, Tensor]
    exact: tuple[Tensor, Tensor]  # [B, H, X, D]
    codec: AdaptiveCodec
    payload: Payload
    rows: BlockRows


def smooth(shape: Shape, generator: torch.Generator) -> Tensor:
    """Random blocks `[M, H, N, D]` whose neighbouring tokens are alike."""
    size = (DISTINCT, shape.kv_heads, BLOCK, shape.head_dim)
    walk = torch.randn(size, generator=generator).cumsum(2) / BLOCK**0.5
    return walk + 0.2 * torch.randn(size, generator=generator)


def cache_of(
    tokens: int, batch: int, dtype: torch.dtype, device: str, shape: Shape, retained: float
) -> Cache:
    """A cache of random numbers."""
    generator = torch.Generator().manual_seed(0)
    keys, values = smooth(shape, generator), smooth(shape, generator)
    moments = LayerMoments(shape.kv_heads, BLOCK, shape.head_dim)
    moments.update(keys, values)
    codec = AdaptiveCodec.fit(moments, round(retained * BLOCK), weights="stored").to(device)
    some = codec.encode(keys.to(device, dtype), values.to(device, dtype))
    blocks = tokens // BLOCK
    rows = torch.arange(batch, device=device).repeat_interleave(blocks)
    ranks = torch.arange(blocks, device=device).repeat(batch)
    payload = some.select((ranks + 7 * rows) % DISTINCT)
    text = (batch, shape.kv_heads, TEXT_TOKENS, shape.head_dim)
    exact = [torch.randn(text, generator=generator).to(device, dtype) for _ in range(2)]
    decoded = codec.decode(some.select(torch.arange(DISTINCT, device=device)))  # [DISTINCT, H, N, D]
    full = []
    for x, known in zip(exact, decoded, strict=True):
        made = x.new_empty(batch, shape.kv_heads, TEXT_TOKENS + tokens, shape.head_dim)
        made[:, :, :TEXT_TOKENS] = x
        for row in range(batch):
            order = (ranks[:blocks] + 7 * row) % DISTINCT
            made[row, :, TEXT_TOKENS:] = known[order].transpose(0, 1).flatten(1, 2)
        full.append(made)
    return Cache((full[0], full[1]), (exact[0], exact[1]), codec, payload, BlockRows(rows, ranks, blocks))


def at_size(
    tokens: int, batch: int, dtype_name: str, device: str, shape: Shape, retained: float, repeats: int
) -> dict[str, Any]:
    """All variants at one size."""
    dtype = getattr(torch, dtype_name)
    cache = cache_of(tokens, batch, dtype, device, shape, retained)
    generator = torch.Generator().manual_seed(1)
    query = torch.randn(batch, shape.heads, 1, shape.head_dim, generator=generator).to(device, dtype)
    scaling = shape.head_dim**-0.5

    def latent() -> Tensor:
        blocks = cache.codec.latent(cache.payload)
        return latent_attention(query, *cache.exact, blocks, cache.rows, None, scaling)

    def grouped() -> Tensor:
        wide = query.view(batch, shape.kv_heads, -1, shape.head_dim)
        return scaled_dot_product_attention(wide, *cache.full).view(query.shape)

    runs: dict[str, Run] = {
        "latent": latent,
        "sdpa": lambda: scaled_dot_product_attention(query, *cache.full, enable_gqa=True),
        "sdpa, grouped": grouped,
    }
    difference = (latent().transpose(1, 2) - grouped()).abs().max().item()
    seconds = measure(runs, repeats, device)
    reason = reason_against(Kind.of(query, cache.payload.tensors["keys"]))
    full, held = (sum(x.nbytes for x in pair) for pair in (cache.full, cache.exact))
    return {
        "tokens": tokens,
        "batch": batch,
        "dtype": dtype_name,
        "repeats": repeats,
        "implementation": f"torch: {reason}" if reason else "triton",
        "seconds": seconds,
        "speedup": min(seconds[name] for name in runs if name != "latent") / seconds["latent"],
        "speedup_over": {name: seconds[name] / seconds["latent"] for name in runs if name != "latent"},
        "bytes": {"full": full, "latent": held + cache.payload.nbytes},
        "largest_difference": difference,
    }


def needed(tokens: int, batch: int, dtype: str, shape: Shape) -> int:
    """Bytes that a size takes at most."""
    numbers = 2 * batch * (tokens + TEXT_TOKENS) * shape.kv_heads * shape.head_dim
    return COPIES * numbers * getattr(torch, dtype).itemsize


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The table."""
    names = list(rows[0]["seconds"]) if rows else []
    lines = [
        "| vision tokens | batch | dtype | "
        + " | ".join(f"{name}, ms" for name in names)
        + " | speedup | bytes |",
        "|--:|--:|---|" + "--:|" * (len(names) + 2),
    ]
    for row in rows:
        cells = [str(row["tokens"]), str(row["batch"]), row["dtype"]]
        cells += [f"{row['seconds'][name] * 1e3:.2f}" for name in names]
        cells += [f"{row['speedup']:.2f}", f"{row['bytes']['full'] / row['bytes']['latent']:.2f} x smaller"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(
    tokens: Annotated[str, typer.Option(help="Vision tokens of a row, comma-separated.")] = "8192,32768",
    batches: Annotated[str, typer.Option(help="Rows, comma-separated.")] = "1,8",
    dtypes: Annotated[str, typer.Option(help="float32, bfloat16, float16.")] = "float32,bfloat16",
    heads: Annotated[int, typer.Option(help="Query heads.")] = 28,
    kv_heads: Annotated[int, typer.Option(help="Key-value heads.")] = 4,
    head_dim: Annotated[int, typer.Option(help="Channels per head.")] = 128,
    retained: Annotated[float, typer.Option(help="Fraction of each block that is kept.")] = 0.4,
    repeats: Annotated[int, typer.Option(help="Timed runs of each variant.")] = 7,
    memory_gb: Annotated[float, typer.Option("--memory", help="Leave out sizes that take more GB.")] = 12,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the numbers here.")] = None,
) -> None:
    """Measure and print a table in markdown; the default heads are those of Qwen2.5-VL-7B."""
    shape, began = Shape(heads, kv_heads, head_dim), time.perf_counter()
    rows: list[dict[str, Any]] = []
    left_out: list[dict[str, Any]] = []
    sizes = [
        (int(n), int(b), dtype)
        for n in tokens.split(",")
        for b in batches.split(",")
        for dtype in dtypes.split(",")
    ]
    with torch.inference_mode():
        for n, batch, dtype in sizes:
            size, bound = {"tokens": n, "batch": batch, "dtype": dtype}, needed(n, batch, dtype, shape)
            if bound > memory_gb * 1e9:
                left_out.append({**size, "reason": f"may take {bound / 1e9:.1f} GB of {memory_gb:g} GB"})
                print(f"{n} tokens, batch {batch}, {dtype}: left out, {left_out[-1]['reason']}", flush=True)
                continue
            rows.append(at_size(n, batch, dtype, device, shape, retained, repeats))
            print(
                f"{n} tokens, batch {batch}, {dtype}: {time.perf_counter() - began:.0f} s so far", flush=True
            )
    Console().print(markdown(rows), soft_wrap=True, highlight=False)
    if json_file is not None:
        setup = {**shape._asdict(), "retained": retained, "text_tokens": TEXT_TOKENS, "device": device}
        report = {"machine": machine(device), "setup": setup, "rows": rows, "left_out": left_out}
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
