"""Measures which attention implementation is fastest, and writes the table that `auto` follows.

    python benchmarks/attention_choice.py

For every dtype, kind of head and length the candidates take turns; a table entry changes only for one that
is at least a tenth faster, since compiling flex takes seconds. Only this device's part of
`src/capsight/blindsight/attention/choice.json` is replaced; the timings go to benchmarks/results.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from attention_measuring import images_of, layout_of, machine, measure, tensors
from prefill_attention import categories_of
from rich.console import Console
from torch.nn.functional import scaled_dot_product_attention

from capsight.blindsight import CAUSAL, Category, MaskOptions, sparse_attention
from capsight.blindsight.attention import auto
from capsight.blindsight.attention.choice import device_name
from capsight.blindsight.attention.work import attend_all, chunk_of

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "src" / "capsight" / "blindsight" / "attention" / "choice.json"
RESULT = ROOT / "benchmarks" / "results" / "attention_choice.json"
KINDS = {"dense": Category.DENSE, "own_image": Category.INTRA_IMAGE_SINK, "sink": Category.SINK}
SHORT = (512, 1024, 2048, 4096)
"""Lengths at which a mask is compared with none."""
WORTH_IT = 0.9
"""A candidate has to take at most this share of the time of the one used so far."""


_ABOUT = (
    "Fastest implementation from so many keys on, per device, dtype and kind of head; measured by "
    "benchmarks/attention_choice.py on the machines named here"
)


def timings(length: int, kind: str, dtype: str, device: str, shape: tuple[int, int, int]) -> dict[str, float]:
    """Median seconds of every candidate; `shape` is query heads, key-value heads, channels."""
    layout = layout_of(length, images_of(length))
    query, key, value = tensors(length, *shape, getattr(torch, dtype), device)
    categories = (KINDS[kind],) * shape[0]
    chunk, scaling = chunk_of(layout, length, length, None), shape[2] ** -0.5

    def in_float32() -> torch.Tensor:
        return attend_all(
            query, key, value, layout, categories, MaskOptions(), CAUSAL, chunk, scaling,
            lambda work, query: auto.in_float32,
        )  # fmt: skip

    runs = {
        name: lambda name=name: sparse_attention(query, key, value, layout, categories, implementation=name)
        for name in ("segments", "flex")
    }
    if dtype != "float32" and device == "cpu":
        runs["segments_float32"] = in_float32
    return measure(runs, 3 if length <= 8192 else 2, device)


def mask_from(dtype: str, device: str, shape: tuple[int, int, int]) -> int:
    """The length from which on a map of a quarter of Dense heads is worth it, against dense attention."""
    worth = [n for n in SHORT if not _wins(n, dtype, device, shape)]
    return SHORT[0] if not worth else 2 * worth[-1]


def _wins(length: int, dtype: str, device: str, shape: tuple[int, int, int]) -> bool:
    layout, categories = layout_of(length, images_of(length)), categories_of(0.25, shape[0])
    query, key, value = tensors(length, *shape, getattr(torch, dtype), device)
    wide = [x.repeat_interleave(shape[0] // shape[1], 1) for x in (key, value)]
    runs = {
        "dense": lambda: scaled_dot_product_attention(query, *wide, is_causal=True),
        "sparse": lambda: sparse_attention(query, key, value, layout, categories),
    }
    seconds = measure(runs, 9, device)
    return seconds["sparse"] <= WORTH_IT * seconds["dense"]


def steps_of(found: dict[int, dict[str, float]]) -> list[list[Any]]:
    """From timings per length to `[[keys, implementation], ...]`."""
    steps: list[list[Any]] = []
    for length, seconds in sorted(found.items()):
        best = min(seconds, key=lambda name: seconds[name])
        used = steps[-1][1] if steps else "segments"
        if seconds[best] > WORTH_IT * seconds[used]:
            best = used
        if not steps:
            steps = [[0, best if best != "flex" else "segments"]]
        if best != steps[-1][1]:
            steps.append([length, best])
    return steps


def main(
    lengths: Annotated[str, typer.Option(help="Prompt tokens, comma-separated.")] = "2048,4096,8192,16384",
    dtypes: Annotated[str, typer.Option(help="float32, bfloat16, float16.")] = "float32,bfloat16",
    heads: Annotated[int, typer.Option(help="Query heads.")] = 4,
    kv_heads: Annotated[int, typer.Option(help="Key-value heads.")] = 2,
    head_dim: Annotated[int, typer.Option(help="Channels per head.")] = 64,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dry_run: Annotated[bool, typer.Option(help="Print, and write nothing.")] = False,
) -> None:
    """Measure, print, and write the table."""
    shape, table, measured, short = (heads, kv_heads, head_dim), {}, {}, {}
    with torch.inference_mode():
        for dtype in dtypes.split(","):
            for kind in KINDS:
                found = {int(n): timings(int(n), kind, dtype, device, shape) for n in lengths.split(",")}
                measured[f"{dtype}, {kind}"] = found
                table.setdefault(dtype, {})[kind] = steps_of(found)
                Console().print(dtype, kind, found, table[dtype][kind], highlight=False)
            short[dtype] = mask_from(dtype, device, shape)
            Console().print(dtype, "a mask wins from", short[dtype], "tokens on", highlight=False)
    if dry_run:
        return
    shipped, name = json.loads(TABLE.read_text()), device_name(torch.device(device))
    shipped["table"].setdefault(name, {}).update(table)
    shipped["mask_from"].setdefault(name, {}).update(short)
    shipped["about"] = _ABOUT
    shipped["measured_on"][name] = machine(device)
    temporary = TABLE.with_suffix(".tmp")
    temporary.write_text(json.dumps(shipped, indent=1) + "\n")
    os.replace(temporary, TABLE)
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    report = {
        "machine": machine(device),
        "shape": shape,
        "seconds": measured,
        "table": table,
        "mask_from": short,
    }
    RESULT.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
