"""Decode time of the reference VLM, one and eight rows of eight images: stock caches and shipped capsules.

    python benchmarks/decode_reference.py

The baselines are transformers' own caches (`evaluation/stock.py`) and quanto's. All take turns, round by
round in another order; a machine that others use is faster in one minute than in the next, so what counts is
the ratio of steps in the same round, and of those the median over rounds.
"""

from __future__ import annotations

import json
import random
import time
from itertools import pairwise
from pathlib import Path
from statistics import median, quantiles
from typing import Annotated, Any

import torch
import typer
from attention_measuring import machine
from option_kinds import integers
from page_parts import speed, table
from rich.console import Console
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from capsight import KVCapsule, enable, load_reference_vlm
from capsight.baselines.quantized import QuantoInt4
from capsight.evaluation import reference_items
from capsight.evaluation.bench import batch_inputs
from capsight.evaluation.stock import GRAPH, STOCK, options_of, stock_cache

RESULT = Path(__file__).parent / "results" / "decode_reference.json"
NEW = 33
HEADS = ["cache", "batch", "ms a step", "tokens/s against the fastest stock cache", "half of the rounds"]


class Ticks(LogitsProcessor):
    """Notes when each step's logits are there."""

    def __init__(self) -> None:
        """Note nothing yet."""
        self.times: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Note it; the scores stay as they are."""
        self.times.append(time.perf_counter())
        return scores

    @property
    def steps(self) -> list[float]:
        """Seconds of each step after the prefill and one more."""
        return [after - before for before, after in pairwise(self.times[1:])]


def measured(
    model: Any, processor: Any, methods: dict[str, Any], batch: int, rounds: int
) -> list[dict[str, Any]]:
    """Rows of the table for one batch size."""
    inputs = batch_inputs(processor, list(reference_items("test", 8, batch)))
    room = inputs["input_ids"].shape[1] + NEW + 1
    asked = {**inputs, "max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}
    steps: list[dict[str, float]] = []
    order, began = [*STOCK, *methods], time.perf_counter()
    for done in range(1 + rounds):
        random.Random(len(steps)).shuffle(order)
        steps.append({})
        for name in order:
            ticks = Ticks()
            options = {**asked, **options_of(name), "logits_processor": LogitsProcessorList([ticks])}
            if name in STOCK:
                model.generate(**options, past_key_values=stock_cache(name, model.config, room))
            else:
                with enable(model, capsule=methods[name]) as fast:
                    fast.generate(**options)
            steps[-1][name] = median(ticks.steps)
        so_far = f"{time.perf_counter() - began:.0f} s so far"
        print(f"batch {batch}, {done} of {rounds} rounds: {so_far}", flush=True)
    del steps[0]  # warms up
    medians = {name: median(each[name] for each in steps) for name in (*STOCK, *methods)}
    best = min(STOCK, key=lambda name: medians[name])
    rows = []
    for name, seconds in medians.items():
        low, middle, high = quantiles((each[best] / each[name] for each in steps), n=4)
        rows.append(
            {
                "cache": name,
                "batch": batch,
                "rounds": rounds,
                "ms_a_token": 1e3 * seconds,
                "speed": middle,
                "quartiles": [low, high],
            }
        )
    return rows


def cells(rows: list[dict[str, Any]]) -> list[list[str]]:
    """The table."""
    return [
        [
            row["cache"],
            str(row["batch"]),
            f"{row['ms_a_token']:.2f}",
            speed(row["speed"]),
            " to ".join(map(speed, row["quartiles"])),
        ]
        for row in rows
    ]


def main(
    rounds: Annotated[int, typer.Option(min=2, help="Timed rounds; the median ratio counts.")] = 9,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 1,
    batches: Annotated[Any, typer.Option(parser=integers(), help="Rows, comma-separated.")] = "1,8",
    json_file: Annotated[Path, typer.Option("--json", help="Write the numbers here.")] = RESULT,
) -> None:
    """Measure and print a table in markdown."""
    json_file.parent.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(threads)
    model, processor = load_reference_vlm()
    joint, heads = (KVCapsule.from_pretrained(name) for name in ("reference", "reference-heads"))
    methods = {
        "quanto-int4": QuantoInt4(),
        "joint 0.05": joint,
        "joint 0.05" + GRAPH: joint,
        "joint 0.02": joint.with_retained(0.02),
        "heads 0.4": heads,
        "heads 0.4" + GRAPH: heads,
        "heads 0.15": heads.with_retained(0.15),
        "heads-int8 0.4": heads.with_bits(8),
        "heads-int4 0.15": heads.with_retained(0.15).with_bits(4),
    }
    rows = [row for batch in batches for row in measured(model, processor, methods, batch, rounds)]
    json_file.write_text(json.dumps({"machine": machine("cpu"), "rows": rows}, indent=1) + "\n")
    Console().print("\n".join(table(HEADS, cells(rows))), soft_wrap=True, highlight=False)


if __name__ == "__main__":
    typer.run(main)
