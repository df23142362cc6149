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
from rich.console import Console

from capsight.blindsight import CAUSAL, Category, MaskOptions, sparse_attention
from capsight.blindsight.attention import auto
from capsight.blindsight.attention.choice import device_name
from capsight.blindsight.attention.work import attend_all, chunk_of

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "src" / "capsight" / "blindsight" / "attention" / "choice.json"
RESULT = ROOT / "benchmarks" / "results" / "attention_choice.json"
KINDS = {"dense": Category.DENSE, "own_image": Category.INTRA_IMAGE_SINK, "sink": Category.SINK}
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
    shape, table, measured = (heads, kv_heads, head_dim), {}, {}
    with torch.inference_mode():
        for dtype in dtypes.split(","):
            for kind in KINDS:
                found = {int(n): timings(int(n), kind, dtype, device, shape) for n in lengths.split(",")}
                measured[f"{dtype}, {kind}"] = found
                table.setdefault(dtype, {})[kind] = steps_of(found)
                Console().print(dtype, kind, found, table[dtype][kind], highlight=False)
    if dry_run:
        return
    shipped, name = json.loads(TABLE.read_text()), device_name(torch.device(device))
    shipped["table"].setdefault(name, {}).update(table)
    shipped["about"] = _ABOUT
    shipped["measured_on"][name] = machine(device)
    temporary = TABLE.with_suffix(".tmp")
    temporary.write_text(json.dumps(shipped, indent=1) + "\n")
    os.replace(temporary, TABLE)
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    report = {"machine": machine(device), "shape": shape, "seconds": measured, "table": table}
    RESULT.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
