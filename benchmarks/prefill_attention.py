"""Time of prefill attention, sparse against dense, at several prompt lengths; one layer, random numbers.

    python benchmarks/prefill_attention.py --json benchmarks/results/prefill.json

Baselines are causal SDPA and causal FlexAttention (the project's own kernel with Dense heads); a head map
is compared with the faster of the two, measured in the same run, all variants taking turns. Masks are made
once per prompt and used by all layers; what that takes is told apart, for a model of 28 layers.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from attention_measuring import (
    Run,
    images_of,
    layout_of,
    machine,
    measure,
    peak_bytes,
    tensors,
)
from rich.console import Console
from torch.nn.functional import scaled_dot_product_attention

from capsight.blindsight import CAUSAL, Category, HeadMap, MaskOptions, sparse_attention
from capsight.blindsight.attention.auto import choose, flex_or_segments
from capsight.blindsight.attention.flex_plan import flex_plan
from capsight.blindsight.attention.segment_plan import segment_plan
from capsight.blindsight.attention.work import Work
from capsight.blindsight.spans import whole
from capsight.layout import PromptLayout

LAYERS = 28
"""Layers that share the masks of a prompt (as many as Qwen2.5-VL-7B has)."""

REPEATS = {4096: 9, 8192: 9}
"""Timed runs up to so many tokens; longer prompts are timed five times."""

Categories = tuple[Category, ...]


def categories_of(dense_share: float, heads: int) -> Categories:
    """So large a share of Dense heads, the rest Intra-Image+Sink."""
    dense = round(dense_share * heads)
    return (Category.DENSE,) * dense + (Category.INTRA_IMAGE_SINK,) * (heads - dense)


def typical_layer(head_map: HeadMap, heads: int) -> Categories:
    """Categories in the shares that they have over all layers of a map, for so many heads."""
    given = sorted((c for layer in head_map.categories for c in layer), key=list(Category).index)
    return tuple(given[(2 * head + 1) * len(given) // (2 * heads)] for head in range(heads))


def building(layout: PromptLayout, categories: Categories, query: torch.Tensor) -> float:
    """Seconds to make anew all masks that a layer needs."""
    start = time.perf_counter()
    for category in set(categories):
        work = Work(layout.rows[0], category, MaskOptions(), CAUSAL, whole(layout.rows[0]))
        plan = flex_plan if choose(work, query) is flex_or_segments else segment_plan
        plan.__wrapped__(work, query.device)
    return time.perf_counter() - start


def at_length(
    length: int, shape: tuple[int, int, int], dtype: str, device: str, head_map: HeadMap | None
) -> dict[str, Any]:
    """All variants at one length; `shape` is query heads, key-value heads, channels."""
    layout, heads = layout_of(length, images_of(length)), shape[0]
    query, key, value = tensors(length, *shape, getattr(torch, dtype), device)
    maps = {f"{share:.0%} dense": categories_of(share, heads) for share in (0.25, 0.5)}
    if head_map is not None:
        maps["calibrated"] = typical_layer(head_map, heads)
    maps = {f"{dtype}, {name}": categories for name, categories in maps.items()}
    wide = [x.repeat_interleave(heads // shape[1], 1) for x in (key, value)]

    def sparse(categories: Sequence[Category], implementation: Any = "auto") -> Run:
        return lambda: sparse_attention(query, key, value, layout, categories, implementation=implementation)

    runs = {name: sparse(categories) for name, categories in maps.items()}
    grown = {name: peak_bytes(run, device) for name, run in runs.items()}
    baselines: dict[str, Run] = {
        f"{dtype}, sdpa causal": lambda: scaled_dot_product_attention(query, *wide, is_causal=True),
        f"{dtype}, flex causal": sparse((Category.DENSE,) * heads, "flex"),
    }
    repeats = next((n for limit, n in REPEATS.items() if length <= limit), 5)
    seconds = measure(runs | baselines, repeats, device, baselines)
    best = min(seconds[name] for name in baselines)
    plans = {name: building(layout, categories, query) for name, categories in maps.items()}
    return {
        "tokens": length,
        "images": images_of(length),
        "dtype": dtype,
        "repeats": repeats,
        "seconds": seconds,
        "speedup": {name: best / seconds[name] for name in maps},
        "plan_seconds": plans,
        "plan_share": {name: plans[name] / (plans[name] + LAYERS * seconds[name]) for name in maps},
        "peak_bytes": grown,
        "bytes_of_an_S_x_S_bool": length**2,
    }


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The table."""
    lines = [
        f"| tokens | images | variant | ms | x best dense | masks, % of {LAYERS} layers | peak MB | SxS MB |",
        "|--:|--:|---|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        for name, seconds in row["seconds"].items():
            cells = ["", "", "", ""]
            if name in row["speedup"]:
                cells = [
                    f"{row['speedup'][name]:.2f}",
                    f"{row['plan_share'][name]:.2%}",
                    f"{row['peak_bytes'][name] / 1e6:.0f}",
                    f"{row['bytes_of_an_S_x_S_bool'] / 1e6:.0f}",
                ]
            front = [str(row["tokens"]), str(row["images"]), name, f"{seconds * 1e3:.1f}"]
            lines.append("| " + " | ".join([*front, *cells]) + " |")
    return "\n".join(lines)


def main(
    lengths: Annotated[str, typer.Option(help="Prompt tokens, comma-separated.")] = "4096,8192,16384,36864",
    dtypes: Annotated[str, typer.Option(help="float32, bfloat16, float16.")] = "float32,bfloat16",
    heads: Annotated[int, typer.Option(help="Query heads.")] = 8,
    kv_heads: Annotated[int, typer.Option(help="Key-value heads.")] = 4,
    head_dim: Annotated[int, typer.Option(help="Channels per head.")] = 64,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    head_map: Annotated[str | None, typer.Option(help="A calibrated head map to measure too.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the numbers here.")] = None,
) -> None:
    """Measure and print a table in markdown."""
    loaded = HeadMap.from_pretrained(head_map) if head_map else None
    began, rows = time.perf_counter(), []
    with torch.inference_mode():
        for length in lengths.split(","):
            for dtype in dtypes.split(","):
                rows.append(at_length(int(length), (heads, kv_heads, head_dim), dtype, device, loaded))
                print(f"{length} tokens, {dtype}: {time.perf_counter() - began:.0f} s so far", flush=True)
    Console().print(markdown(rows), soft_wrap=True, highlight=False)
    if json_file is not None:
        kinds = dtypes.replace(",", " and ")
        setup = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "dtype": kinds, "device": device}
        report = {"machine": machine(device), "setup": setup, "rows": rows}
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
