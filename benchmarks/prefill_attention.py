"""Time of prefill attention, sparse against dense, at several prompt lengths; one layer, random numbers.

    python benchmarks/prefill_attention.py --lengths 4096,8192,16384,36864 --dtype bfloat16 --json out.json

Baselines are causal SDPA and causal FlexAttention (the project's own kernel with Dense heads); a head
map is compared with the faster of the two, measured in the same run, all variants taking turns.
"""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from capsight.blindsight import CAUSAL, Category, HeadMap, MaskOptions, sparse_attention
from capsight.blindsight.attention.flex_plan import flex_plan
from capsight.blindsight.attention.segment_plan import segment_plan
from capsight.blindsight.attention.work import Work
from capsight.blindsight.spans import whole
from capsight.layout import PromptLayout, RowLayout, VisionBlock

TEXT_TOKENS = 256
"""Tokens of the question after the images, and of the instructions before them, together."""

Run = Callable[[], Tensor]


def layout_of(length: int, images: int) -> PromptLayout:
    """One prompt: a quarter of the text, so many equal images between delimiters, the rest of the text."""
    size = (length - TEXT_TOKENS) // images - 2
    position, blocks = TEXT_TOKENS // 4, []
    for image in range(images):
        start, end = position + 1, position + 1 + size
        blocks.append(VisionBlock(start, end, "image", (1, 1, size), image, (position, end)))
        position = end + 1
    return PromptLayout((RowLayout(length, 0, tuple(blocks)),))


def images_of(length: int) -> int:
    """8 images up to 4k tokens, 32 at 36k, in between in proportion."""
    return max(8, min(32, round(length / 1152)))


def categories_of(dense_share: float, heads: int) -> tuple[Category, ...]:
    """So large a share of Dense heads, the rest Intra-Image+Sink."""
    dense = round(dense_share * heads)
    return (Category.DENSE,) * dense + (Category.INTRA_IMAGE_SINK,) * (heads - dense)


def measure(runs: dict[str, Run], repeats: int, device: str) -> dict[str, float]:
    """Median seconds of each run; they take turns, after one warm-up each."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats + 1):
        for name, run in runs.items():
            _wait(device)
            start = time.perf_counter()
            run()
            _wait(device)
            if repeat:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def building(layout: PromptLayout, categories: tuple[Category, ...], device: str) -> float:
    """Seconds to make all plans of a layer anew (they are cached, so a model pays once per prompt)."""
    target = torch.device(device)
    start = time.perf_counter()
    for category in set(categories):
        work = Work(layout.rows[0], category, MaskOptions(), CAUSAL, whole(layout.rows[0]))
        (segment_plan if category is Category.DENSE else flex_plan).__wrapped__(work, target)
    return time.perf_counter() - start


def peak_bytes(run: Run, device: str) -> int:
    """Bytes that a run, already warm, holds at its peak beyond those held before it (CPU: Linux only)."""
    run()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark back
    before = _status("VmRSS")
    run()
    return _status("VmHWM") - before


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def at_length(
    length: int, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: str, repeats: int,
    head_map: HeadMap | None,
) -> dict[str, Any]:  # fmt: skip
    """All variants at one length."""
    layout = layout_of(length, images_of(length))
    generator = torch.Generator().manual_seed(length)
    query, key, value = (
        torch.randn(1, h, length, head_dim, generator=generator).to(device, dtype)
        for h in (heads, kv_heads, kv_heads)
    )
    maps = {f"{share:.0%} dense": categories_of(share, heads) for share in (0.25, 0.5)}
    if head_map is not None:
        middle = head_map.categories[head_map.num_layers // 2]
        maps["calibrated, middle layer"] = tuple(middle[head % len(middle)] for head in range(heads))
    wide = [x.repeat_interleave(heads // kv_heads, 1) for x in (key, value)]

    def sparse(categories: tuple[Category, ...], implementation: Any = "auto") -> Run:
        return lambda: sparse_attention(query, key, value, layout, categories, implementation=implementation)

    runs: dict[str, Run] = {name: sparse(categories) for name, categories in maps.items()}
    grown = {name: peak_bytes(run, device) for name, run in runs.items()}
    dense = (Category.DENSE,) * heads
    runs |= {f"{name}, segments": sparse(categories, "segments") for name, categories in maps.items()}
    runs["sdpa causal"] = lambda: scaled_dot_product_attention(query, *wide, is_causal=True)
    runs["flex causal"] = sparse(dense, "flex")
    seconds = measure(runs, repeats, device)
    best = min(seconds["sdpa causal"], seconds["flex causal"])
    return {
        "tokens": length,
        "images": images_of(length),
        "seconds": seconds,
        "speedup": {name: best / seconds[name] for name in maps},
        "plan_seconds": {name: building(layout, categories, device) for name, categories in maps.items()},
        "peak_bytes": grown,
        "bytes_of_an_S_x_S_bool": length**2,
    }


def main(
    lengths: Annotated[str, typer.Option(help="Prompt tokens, comma-separated.")] = "4096,8192,16384,36864",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    heads: Annotated[int, typer.Option(help="Query heads.")] = 8,
    kv_heads: Annotated[int, typer.Option(help="Key-value heads.")] = 2,
    head_dim: Annotated[int, typer.Option(help="Channels per head.")] = 64,
    repeats: Annotated[int, typer.Option(help="Timed runs; the median counts.")] = 5,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    head_map: Annotated[str | None, typer.Option(help="A calibrated head map to measure too.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the numbers here.")] = None,
) -> None:
    """Measure and print a table."""
    kind = getattr(torch, dtype)
    loaded = HeadMap.from_pretrained(head_map) if head_map else None
    with torch.inference_mode():
        rows = [
            at_length(int(length), heads, kv_heads, head_dim, kind, device, repeats, loaded)
            for length in lengths.split(",")
        ]
    table = Table(title=f"attention of one layer, {heads}/{kv_heads} heads of {head_dim}, {dtype}, {device}")
    for column in ("tokens", "images", "variant", "ms", "x faster than the best dense", "plan, % of it"):
        table.add_column(column, justify="right")
    for row in rows:
        for name, seconds in row["seconds"].items():
            speedup = f"{row['speedup'][name]:.2f}" if name in row["speedup"] else ""
            plan = f"{row['plan_seconds'][name] / seconds:.1%}" if name in row["plan_seconds"] else ""
            cells = (f"{row['tokens']}", f"{row['images']}", name, f"{seconds * 1000:.1f}", speedup, plan)
            table.add_row(*cells)
    Console().print(table)
    if json_file is not None:
        machine = {
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "processor": torch.cuda.get_device_name() if device == "cuda" else platform.processor(),
        }
        setup = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "dtype": dtype, "device": device}
        json_file.write_text(json.dumps({"machine": machine, "setup": setup, "rows": rows}, indent=1) + "\n")


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    typer.run(main)
