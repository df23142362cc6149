"""What making capsules adds to a prefill: the reference VLM, and a larger model with random weights.

    python benchmarks/encode_cost.py

A prefill of the full cache and filling both caches from it take turns. The larger model is that of ttft.py;
its capsule is fitted to two prompts, since what was learnt changes nothing of the cost.
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
from rich.console import Console
from ttft import large_model

from capsight import KVCapsule, enable, load_reference_vlm
from capsight.cli.output import machine
from capsight.evaluation import reference_items
from capsight.evaluation.bench import batch_inputs
from capsight.evaluation.cache_bytes import CacheBytes
from capsight.evaluation.prefill import Prefill
from capsight.evaluation.timing import time_once

RESULT = Path(__file__).parent / "results" / "encode_cost.json"


def seconds(run: Callable[[], object]) -> float:
    """How long it takes."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def measured(model: Any, processor: Any, capsule: KVCapsule, batch: int, runs: int) -> dict[str, Any]:
    """One prompt of eight images a row: medians of so many runs after one that warms up."""
    inputs = batch_inputs(processor, list(reference_items("test", 8, batch)))
    with enable(model) as plain, torch.no_grad():
        prefill = Prefill.record(model, inputs, None, False)
        found: dict[str, list[float]] = {"first_token_s": [], "full_s": [], "capsules_s": []}
        for run in range(1 + runs):
            took = {
                "first_token_s": time_once(plain, inputs, 2).ttft_s,
                "full_s": seconds(lambda: CacheBytes.of(prefill.cache(None))),
                "capsules_s": seconds(lambda: CacheBytes.of(prefill.cache(capsule))),
            }
            if run:
                for name, value in took.items():
                    found[name].append(value)
    row: dict[str, Any] = {name: median(values) for name, values in found.items()}
    row |= {"batch": batch, "tokens": inputs["input_ids"].shape[1], "runs": runs}
    return row | {"added": (row["capsules_s"] - row["full_s"]) / row["first_token_s"]}


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table."""
    lines = [
        "| model | batch | tokens | first token, ms | full cache, ms | capsules, ms | added |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        times = (f"{1e3 * row[name]:.1f}" for name in ("first_token_s", "full_s", "capsules_s"))
        cells = [row["model"], str(row["batch"]), str(row["tokens"]), *times, f"{row['added']:.1%}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(
    runs: Annotated[int, typer.Option(help="Timed runs; the median counts.")] = 7,
    json_file: Annotated[Path, typer.Option("--json", help="Write the numbers here.")] = RESULT,
) -> None:
    """Measure and print a table in markdown."""
    reference, processor = load_reference_vlm()
    shipped = KVCapsule.from_pretrained("reference")
    rows = [
        {"model": "reference VLM, float32"} | measured(reference, processor, shipped, batch, runs)
        for batch in (1, 8)
    ]
    large = large_model(reference.config, torch.bfloat16)
    samples = [batch_inputs(processor, [item]) for item in reference_items("calibration", 4, 2)]
    fitted = KVCapsule.fit(large, None, samples, progress=False)
    size = sum(p.numel() for p in large.parameters())
    name = f"random weights, {size / 1e9:.2f} B, bfloat16"
    rows.append({"model": name} | measured(large, processor, fitted, 1, runs))
    json_file.parent.mkdir(parents=True, exist_ok=True)
    json_file.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")
    Console().print(markdown(rows), soft_wrap=True, highlight=False)


if __name__ == "__main__":
    typer.run(main)
