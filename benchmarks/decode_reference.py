"""Decode time of the reference VLM, one row of eight images: stock caches beside the shipped capsules.

    python benchmarks/decode_reference.py

The baselines are transformers' own caches; all take turns, medians count, and speed is a ratio to the faster
stock cache of the same run.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from attention_measuring import machine
from rich.console import Console
from transformers import DynamicCache, StaticCache

from capsight import KVCapsule, enable, load_reference_vlm
from capsight.evaluation import reference_items
from capsight.evaluation.bench import batch_inputs

RESULT = Path(__file__).parent / "results" / "decode_reference.json"
NEW = 33
STOCK: dict[str, Callable[[Any, int], Any]] = {
    "DynamicCache": lambda config, room: DynamicCache(config=config),
    "StaticCache": lambda config, room: StaticCache(config=config, max_cache_len=room),
}


def a_token(run: Callable[[int], object]) -> float:
    """Seconds of one more token: `run(n)` generates n, and what comes before the first is subtracted."""
    took = []
    for new in (1, NEW):
        start = time.perf_counter()
        run(new)
        took.append(time.perf_counter() - start)
    return (took[1] - took[0]) / (NEW - 1)


def main(
    runs: Annotated[int, typer.Option(help="Timed runs of each; the median counts.")] = 7,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
    json_file: Annotated[Path, typer.Option("--json", help="Write the numbers here.")] = RESULT,
) -> None:
    """Measure and print a table in markdown."""
    torch.set_num_threads(threads)
    model, processor = load_reference_vlm()
    inputs = batch_inputs(processor, list(reference_items("test", 8, 1)))
    room = inputs["input_ids"].shape[1] + NEW + 1
    joint, heads = (KVCapsule.from_pretrained(name) for name in ("reference", "reference-heads"))
    capsules = {
        "joint 0.05": joint,
        "joint 0.02": joint.with_retained(0.02),
        "heads 0.4": heads,
        "heads 0.15": heads.with_retained(0.15),
        "heads-int8 0.4": heads.with_bits(8),
        "heads-int4 0.15": heads.with_retained(0.15).with_bits(4),
    }

    def stock(name: str, new: int) -> None:
        cache = STOCK[name](model.config, room)
        model.generate(
            **inputs, past_key_values=cache, max_new_tokens=new, min_new_tokens=new, do_sample=False
        )

    def capsule(method: KVCapsule, new: int) -> None:
        with enable(model, capsule=method) as fast:
            fast.generate(**inputs, max_new_tokens=new, min_new_tokens=new, do_sample=False)

    found: dict[str, list[float]] = {name: [] for name in (*STOCK, *capsules)}
    for run in range(1 + runs):
        for name in found:
            method = capsules.get(name)
            part = (lambda n, name=name: stock(name, n)) if method is None else None
            seconds = a_token(part or (lambda n, method=method: capsule(method, n)))
            if run:
                found[name].append(seconds)
    medians = {name: median(values) for name, values in found.items()}
    best = min(medians[name] for name in STOCK)
    rows = [{"cache": n, "ms_a_token": 1e3 * s, "speed": best / s} for n, s in medians.items()]
    json_file.write_text(json.dumps({"machine": machine("cpu"), "rows": rows}, indent=1) + "\n")
    lines = ["| cache | ms a token | tokens/s, x the faster stock cache |", "|---|--:|--:|"]
    lines += [f"| {r['cache']} | {r['ms_a_token']:.2f} | {r['speed']:.2f} |" for r in rows]
    Console().print("\n".join(lines), soft_wrap=True, highlight=False)


if __name__ == "__main__":
    typer.run(main)
