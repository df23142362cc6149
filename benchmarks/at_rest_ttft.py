"""Time to the first token of a question about eight stored images, beside prefilling them.

    python benchmarks/at_rest_ttft.py

Pixels are ready in all cases. "prefill" reads images and question in one pass with the stock cache;
"anywhere" and "prefix" take all eight images from a warm `CapsuleStore` in a folder: hashing the pixels,
reading and decoding eight files, reading the text, and the question. They take turns; medians. The larger
model has random weights (see `ttft.py`) and a capsule fitted to two prompts: what was learnt does not change
the cost.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from transformers import DynamicCache
from ttft import large_model

from capsight import KVCapsule, enable, load_reference_vlm
from capsight.cli.output import machine
from capsight.evaluation import reference_items
from capsight.evaluation.bench import batch_inputs
from capsight.evaluation.prompting import process
from capsight.kvcapsule.rest import DEFAULT_QUALITY, CapsuleStore
from capsight.kvcapsule.rest.latents import code, decode
from capsight.kvcapsule.rest.parts import image_sizes, joint_codec, open_latents

RESULT = Path(__file__).parent / "results" / "at_rest_ttft.json"
WAYS = ("prefill", "prefix", "anywhere")


def measured(model: Any, processor: Any, capsule: KVCapsule, runs: int) -> dict[str, Any]:
    """Medians over so many runs after one that warms up."""
    inputs = batch_inputs(processor, list(reference_items("test", 8, 1)))
    took: dict[str, list[float]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        for run in range(1 + runs):
            for way in WAYS:
                kept = None if way == "prefill" else CapsuleStore(f"{folder}/{way}", reuse=way)  # type: ignore[arg-type]
                with enable(model, capsule=None if kept is None else capsule, store=kept) as fast:
                    start = time.perf_counter()
                    cache = DynamicCache(config=model.config) if kept is None else None
                    fast.generate(**inputs, past_key_values=cache, max_new_tokens=1, do_sample=False)
                    if run:
                        took[way].append(time.perf_counter() - start)
        nbytes = sum(file.nbytes for file in CapsuleStore(f"{folder}/anywhere").files())
        coding = coding_seconds(model, capsule, inputs, runs)
    row: dict[str, Any] = {f"{way}_s": median(times) for way, times in took.items()}
    row |= {f"{way}_of_prefill": row[f"{way}_s"] / row["prefill_s"] for way in WAYS[1:]}
    return row | {"tokens": inputs["input_ids"].shape[1], "runs": runs, "store_bytes": nbytes} | coding


def coding_seconds(model: Any, capsule: KVCapsule, inputs: dict[str, Any], runs: int) -> dict[str, float]:
    """Medians of coding and decoding all images' latents."""
    codec = joint_codec(capsule)
    with enable(model, capsule=capsule) as fast:
        cache = fast.encapsulate(**inputs)
    sizes = image_sizes(cache.layout)
    images = open_latents(cache, codec).split(sizes)
    coded, decoded = [], []
    for _ in range(runs):
        start = time.perf_counter()
        pieces = [code(latents, codec.lost, DEFAULT_QUALITY) for latents in images]
        coded.append(time.perf_counter() - start)
        for piece, size in zip(pieces, sizes, strict=True):
            decode(piece, size, codec.levels.rank)
        decoded.append(time.perf_counter() - start - coded[-1])
    return {"code_s": median(coded), "decode_s": median(decoded), "image_bytes": sum(map(len, pieces))}


def main(
    runs: Annotated[int, typer.Option(help="Timed runs; the median counts.")] = 5,
    large: Annotated[bool, typer.Option(help="Also the model of 0.5 B parameters.")] = True,
    json_file: Annotated[Path, typer.Option("--json", help="Write the numbers here.")] = RESULT,
) -> None:
    """Measure, print and write JSON."""
    model, processor = load_reference_vlm()
    rows = {"reference": measured(model, processor, KVCapsule.from_pretrained("reference"), runs)}
    Console().print(rows)
    if large:
        big = large_model(model.config, torch.bfloat16)
        samples = [process(processor, i, [i.asks[0].question]) for i in reference_items("calibration", 2, 2)]
        rows["0.5 B"] = measured(big, processor, KVCapsule.fit(big, processor, samples, progress=False), runs)
        Console().print(rows)
    json_file.write_text(json.dumps({"rows": rows, "machine": machine()}, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
