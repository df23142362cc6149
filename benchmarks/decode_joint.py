"""Time of one decode step's attention over joint latents, one layer, against SDPA on the full cache.

    python benchmarks/decode_joint.py

Every layer reads the latents that all layers share, R numbers a token, so the work of a layer grows with R
and not with what a layer would store by itself. 512 is what a fit keeps at least, 2,048 what it keeps at most
unless it is told otherwise. Images of 1024 tokens, positions of M-RoPE; latents, axes and queries are random.
Both take turns with SDPA whose rows are the query heads of a KV head.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from attention_measuring import Run, machine, measure
from page_parts import speed, table
from rich.console import Console
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from capsight.kvcapsule.attention.joint import JointTokens
from capsight.kvcapsule.attention.latents import LatentTokens, LayerBasis, PackedLatents
from capsight.kvcapsule.attention.native import Sources, build
from capsight.kvcapsule.codecs.levels import GROUP, POINTS, Levels
from capsight.kvcapsule.codecs.rotary import Rotary

RESULT = Path(__file__).parent / "results" / "decode_joint.json"
SIDE = 32
"""Rows and columns of an image, in tokens."""
SECTIONS = 16, 24, 24
"""Pairs of channels that time, height and width turn, as in Qwen2.5-VL."""


def latents_of(tokens: int, batch: int, rank: int, kv_heads: int, head_dim: int) -> tuple[JointTokens, int]:
    """Random latents of a batch, and bytes of one: a sixth of the coordinates in 8 bits, a third in 4."""
    first, second = (rank * part // 6 // GROUP * GROUP for part in (1, 2))
    levels = Levels(first, second, rank - first - second)
    groups, g = rank // GROUP, torch.Generator().manual_seed(0)
    all_tokens = tokens * batch
    codes = torch.randint(0, 256, (all_tokens, levels.nbytes - 2 * groups), generator=g, dtype=torch.uint8)
    scales = torch.rand(all_tokens, groups, generator=g).half() / 100
    place = torch.arange(tokens)
    image, row, column = place // SIDE**2, place // SIDE % SIDE, place % SIDE
    positions = (torch.stack((torch.zeros_like(row), row, column)) + image * (SIDE + 2)).repeat(1, batch)
    axes = torch.arange(3).repeat_interleave(torch.tensor(SECTIONS))
    turning = Rotary(1e6 ** -(torch.arange(len(axes)).double() / len(axes)), axes, False, 1.0)
    counts = torch.full((batch,), tokens)
    own = torch.randint(-127, 128, (2, kv_heads, head_dim, rank), generator=g, dtype=torch.int8)
    steps = torch.full((rank,), rank**-0.5 / 73)  # numbers of size 1 / sqrt(R)
    mean = torch.randn(2, kv_heads, head_dim, generator=g)
    return JointTokens(
        PackedLatents(codes, scales, levels.counts, POINTS),
        LatentTokens(counts.cumsum(0) - counts, counts, positions, turning),
        LayerBasis(own[0], steps, mean[0], own[1], steps, mean[1]),
    ), levels.nbytes


def at_size(
    tokens: int, batch: int, rank: int, heads: tuple[int, int, int], level: str, repeats: int
) -> dict[str, Any]:
    """Both at one size."""
    query_heads, kv_heads, head_dim = heads
    joint, nbytes = latents_of(tokens, batch, rank, kv_heads, head_dim)
    query = torch.randn(batch, query_heads, 1, head_dim).bfloat16()
    keys, values = (torch.randn(batch, kv_heads, tokens, head_dim).bfloat16() for _ in range(2))
    grouped = query.view(batch, kv_heads, -1, head_dim)

    def latents() -> Tensor:
        return joint.attend(query, Sources(()), head_dim**-0.5)[0]

    runs: dict[str, Run] = {
        "sdpa, grouped": partial(scaled_dot_product_attention, grouped, keys, values),
        "joint": latents,
    }
    seconds = measure(runs, repeats, "cpu")
    return {
        "tokens": tokens,
        "batch": batch,
        "rank": rank,
        "code": level,
        "repeats": repeats,
        "bytes_a_token": nbytes,
        "full_bytes_a_token_and_layer": 4 * kv_heads * head_dim,
        "seconds": seconds,
        "speedup": seconds["sdpa, grouped"] / seconds["joint"],
    }


HEADS = ["vision tokens", "batch", "R", "sdpa, grouped", "joint", "joint against sdpa"]


def cells(row: dict[str, Any]) -> list[str]:
    """Of the table."""
    times = (f"{1e3 * row['seconds'][name]:.2f} ms" for name in ("sdpa, grouped", "joint"))
    return [str(row["tokens"]), str(row["batch"]), str(row["rank"]), *times, speed(row["speedup"])]


def main(
    tokens: Annotated[str, typer.Option(help="Vision tokens of a row, comma-separated.")] = "8192,32768",
    batches: Annotated[str, typer.Option(help="Rows, comma-separated.")] = "1,8",
    ranks: Annotated[str, typer.Option(help="Numbers of a latent, comma-separated.")] = "512,2048",
    heads: Annotated[int, typer.Option(help="Query heads.")] = 28,
    kv_heads: Annotated[int, typer.Option(help="Key-value heads.")] = 4,
    head_dim: Annotated[int, typer.Option(help="Channels per head.")] = 128,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
    repeats: Annotated[int, typer.Option(help="Timed runs; the median counts.")] = 5,
    json_file: Annotated[Path, typer.Option("--json", help="Write the numbers here.")] = RESULT,
) -> None:
    """Measure and print a table in markdown; the default heads are those of Qwen2.5-VL-7B."""
    torch.set_num_threads(threads)
    shape, level = (heads, kv_heads, head_dim), build.best_level()
    with torch.inference_mode():
        rows = [
            at_size(n, b, r, shape, level, repeats)
            for r in map(int, ranks.split(","))
            for n in map(int, tokens.split(","))
            for b in map(int, batches.split(","))
        ]
    setup = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim}
    json_file.write_text(
        json.dumps({"machine": machine("cpu"), "setup": setup, "rows": rows}, indent=1) + "\n"
    )
    Console().print("\n".join(table(HEADS, map(cells, rows))), soft_wrap=True, highlight=False)


if __name__ == "__main__":
    typer.run(main)
