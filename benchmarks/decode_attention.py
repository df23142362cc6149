"""Time of one decode step's attention over capsules, as they are, against SDPA on the full cache; one layer.

    python benchmarks/decode_attention.py --json benchmarks/results/decode_attention.json

Every row of the batch has so many vision tokens in capsules, some exact text tokens and one new token. Two
kinds of capsules: *heads*, where each KV head reads the tokens that it kept, and *adaptive*, where all
others follow from those kept, without being rebuilt. By how much their outputs differ from SDPA under a mask
and from SDPA over what the capsules stand for is reported. On CPUs *native* reads the tokens of `heads` in
one call, where they lie, in 16, 8 and 4 bits; *native, full* reads the full cache so, which shows what of the
gain is the code's and what the capsules'. Native calls are those of a compiled step: prepared, and each one
stores the new token, too, which SDPA's do not. All times are of one run: only their ratios mean something.
The baseline is SDPA as transformers calls it (`enable_gqa`) and SDPA with the query heads of a KV head as
its rows, which reads each key once; speedup is over the faster of the two, measured in the same run, all
taking turns. Making the latent form of a capsule from what the cache stores is part of each latent run.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from attention_measuring import TEXT_TOKENS, Run, machine, measure
from native_steps import native_runs
from page_parts import table
from rich.console import Console
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from capsight.kvcapsule.attention import BlockRows, latent_attention
from capsight.kvcapsule.attention.choice import Kind, reason_against
from capsight.kvcapsule.attention.native import supports
from capsight.kvcapsule.codecs import AdaptiveCodec, HeadsCodec, Payload
from capsight.kvcapsule.codecs.moments import LayerMoments

BLOCK = 64
DISTINCT = 64
"""Blocks that are encoded; the cache repeats them."""

COPIES, OF_KEPT = 3, 6.5
"""What a size takes at most while it is made and measured: so many full caches, and kept tokens."""


class Shape(NamedTuple):
    """Query heads, KV heads, channels."""

    heads: int
    kv_heads: int
    head_dim: int


class Cache(NamedTuple):
    """One layer of a batch: exact keys and values `[B, H, X, D]`, and two kinds of capsules of the rest."""

    exact: tuple[Tensor, Tensor]
    capsules: dict[str, tuple[AdaptiveCodec | HeadsCodec, Payload]]
    rows: BlockRows

    def full(self, name: str) -> tuple[Tensor, Tensor]:
        """Keys and values `[B, H, S, D]`: what these capsules stand for, after the exact ones."""
        codec, payload = self.capsules[name]
        keys, values = (
            torch.cat((own, self._in_rows(x).flatten(2, 3)), 2)
            for own, x in zip(self.exact, codec.decode(payload), strict=True)
        )
        return keys, values

    def shown(self, name: str) -> Tensor | None:
        """Which of them attention sees: bool `[B, H, 1, S]`, or None for all."""
        codec, payload = self.capsules[name]
        bias = codec.bias(payload)  # [M, H, N]
        if bias is None:
            return None
        shown = self._in_rows(bias).flatten(2) == 0
        return torch.nn.functional.pad(shown, (self.exact[0].shape[2], 0), value=True)[:, :, None]

    def _in_rows(self, x: Tensor) -> Tensor:
        """Blocks `[M, H, ...]`, row by row: `[B, H, M / B, ...]`."""
        return x.unflatten(0, (len(self.exact[0]), -1)).transpose(1, 2)


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
    kept, blocks = round(retained * BLOCK), tokens // BLOCK
    codec = AdaptiveCodec.fit(moments, kept, weights="stored").to(device)
    heads = HeadsCodec.fit(moments, kept).to(device)
    some, own = (each.encode(keys.to(device, dtype), values.to(device, dtype)) for each in (codec, heads))
    rows = torch.arange(batch, device=device).repeat_interleave(blocks)
    ranks = torch.arange(blocks, device=device).repeat(batch)
    drawn = (ranks + 7 * rows) % DISTINCT
    capsules = {"heads": (heads, own.select(drawn)), "adaptive": (codec, some.select(drawn))}
    text = (batch, shape.kv_heads, TEXT_TOKENS, shape.head_dim)
    exact = [torch.randn(text, generator=generator).to(device, dtype) for _ in range(2)]
    return Cache((exact[0], exact[1]), capsules, BlockRows(rows, ranks, blocks))


def at_size(
    tokens: int, batch: int, dtype_name: str, device: str, shape: Shape, retained: float, repeats: int
) -> dict[str, Any]:
    """All variants at one size."""
    dtype = getattr(torch, dtype_name)
    cache = cache_of(tokens, batch, dtype, device, shape, retained)
    full = cache.full("adaptive")
    generator = torch.Generator().manual_seed(1)
    query = torch.randn(batch, shape.heads, 1, shape.head_dim, generator=generator).to(device, dtype)
    scaling = shape.head_dim**-0.5

    def capsules(name: str) -> Tensor:
        codec, payload = cache.capsules[name]
        return latent_attention(query, *cache.exact, codec.latent(payload), cache.rows, None, scaling)

    def grouped(keys: Tensor, values: Tensor, mask: Tensor | None = None) -> Tensor:
        wide = query.view(batch, shape.kv_heads, -1, shape.head_dim)
        return scaled_dot_product_attention(wide, keys, values, attn_mask=mask).view(query.shape)

    def difference(name: str) -> float:
        expected = grouped(*cache.full(name), cache.shown(name))
        return (capsules(name).transpose(1, 2) - expected).abs().max().item()

    runs: dict[str, Run] = {
        **{name: partial(capsules, name) for name in cache.capsules},
        "sdpa": lambda: scaled_dot_product_attention(query, *full, enable_gqa=True),
        "sdpa, grouped": partial(grouped, *full),
    }
    differences = {name: difference(name) for name in cache.capsules}
    if supports(query):
        runs |= native_runs(*cache.capsules["heads"], cache.rows, cache.exact, full, query, repeats + 1)
    seconds = measure(runs, repeats, device)
    best = min(seconds[name] for name in ("sdpa", "sdpa, grouped"))
    reason = reason_against(Kind.of(query, cache.capsules["adaptive"][1].tensors["keys"]))
    whole, held = (sum(x.nbytes for x in pair) for pair in (full, cache.exact))
    return {
        "tokens": tokens,
        "batch": batch,
        "dtype": dtype_name,
        "retained": retained,
        "repeats": repeats,
        "adaptive_by": f"torch: {reason}" if reason else "triton",
        "seconds": seconds,
        "speedup": {name: best / seconds[name] for name in runs if not name.startswith("sdpa")},
        "bytes": {"full": whole, **{n: held + payload.nbytes for n, (_, payload) in cache.capsules.items()}},
        "largest_difference": differences,
    }


def needed(tokens: int, batch: int, dtype: str, shape: Shape, retained: float) -> float:
    """Bytes that a size takes at most."""
    numbers = 2 * batch * (tokens + TEXT_TOKENS) * shape.kv_heads * shape.head_dim
    return (COPIES + OF_KEPT * retained) * numbers * getattr(torch, dtype).itemsize


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The table."""
    names, fast = ([*rows[0][kind]] if rows else [] for kind in ("seconds", "speedup"))
    measured = [*(f"{name}, ms" for name in names), *(f"{name}, faster" for name in fast)]
    cells = [
        [row["dtype"], str(row["tokens"]), str(row["batch"]), f"{row['retained']:g}"]
        + [f"{row['seconds'][name] * 1e3:.2f}" for name in names]
        + [f"{row['speedup'][name]:.2f}x" for name in fast]
        for row in rows
    ]
    return "\n".join(table(["dtype", "vision tokens", "batch", "retained", *measured], cells))


def main(
    tokens: Annotated[str, typer.Option(help="Vision tokens of a row, comma-separated.")] = "8192,32768",
    batches: Annotated[str, typer.Option(help="Rows, comma-separated.")] = "1,8",
    dtypes: Annotated[str, typer.Option(help="float32, bfloat16, float16.")] = "float32,bfloat16",
    heads: Annotated[int, typer.Option(help="Query heads.")] = 28,
    kv_heads: Annotated[int, typer.Option(help="Key-value heads.")] = 4,
    head_dim: Annotated[int, typer.Option(help="Channels per head.")] = 128,
    retained: Annotated[str, typer.Option(help="Retained fractions, comma-separated.")] = "0.4,0.15",
    repeats: Annotated[int, typer.Option(help="Timed runs of each variant.")] = 15,
    memory_gb: Annotated[float, typer.Option("--memory", help="Leave out sizes that take more GB.")] = 12,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the numbers here.")] = None,
) -> None:
    """Measure and print a table in markdown; the default heads are those of Qwen2.5-VL-7B."""
    shape, began = Shape(heads, kv_heads, head_dim), time.perf_counter()
    rows: list[dict[str, Any]] = []
    left_out: list[dict[str, Any]] = []
    sizes = [
        (int(n), int(b), dtype, float(rho))
        for rho in retained.split(",")
        for n in tokens.split(",")
        for b in batches.split(",")
        for dtype in dtypes.split(",")
    ]
    with torch.inference_mode():
        for n, batch, dtype, rho in sizes:
            size, bound = {"tokens": n, "batch": batch, "dtype": dtype}, needed(n, batch, dtype, shape, rho)
            if bound > memory_gb * 1e9:
                left_out.append({**size, "reason": f"may take {bound / 1e9:.1f} GB of {memory_gb:g} GB"})
                print(f"{n} tokens, batch {batch}, {dtype}: left out, {left_out[-1]['reason']}", flush=True)
                continue
            rows.append(at_size(n, batch, dtype, device, shape, rho, repeats))
            so_far = f"{time.perf_counter() - began:.0f} s so far"
            print(f"{n} tokens, batch {batch}, {dtype}, {rho:g}: {so_far}", flush=True)
    Console().print(markdown(rows), soft_wrap=True, highlight=False)
    if json_file is not None:
        setup = {**shape._asdict(), "text_tokens": TEXT_TOKENS, "device": device}
        report = {"machine": machine(device), "setup": setup, "rows": rows, "left_out": left_out}
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
