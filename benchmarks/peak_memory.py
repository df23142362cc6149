"""Peak memory of a generation: eight rows of eight images on the reference VLM, stock caches and capsules.

    python benchmarks/peak_memory.py

Resident memory, as Linux counts it, beyond what was resident before. Every cache has a process of its own, in
which glibc maps each block of 64 KB and more by itself (`MALLOC_MMAP_THRESHOLD_`), so that what is freed is
given back at once. The vision tower runs before there is any cache; the peak from the first text layer on,
prefill and decoding, is a column of its own.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from attention_measuring import machine
from option_kinds import one_of
from page_parts import human_bytes, table
from rich.console import Console

from capsight import KVCapsule, enable, load_reference_vlm
from capsight.baselines.quantized import QuantoInt4
from capsight.evaluation import reference_items
from capsight.evaluation.bench import batch_inputs
from capsight.evaluation.stock import stock_cache

RESULT = Path(__file__).parent / "results" / "peak_memory.json"
CACHES = ("DynamicCache", "StaticCache", "quanto-int4", "joint 0.05", "heads 0.4", "heads-int4 0.15")
HEADS = ["cache", "whole generation", "prefill and decoding", "held at the end"]
NEW = 32
_PROCESS = Path("/proc/self")


def method_of(name: str) -> Any:
    """The capsule or baseline of that name; None for stock caches."""
    heads = "reference-heads"
    return {
        "quanto-int4": lambda: QuantoInt4(),
        "joint 0.05": lambda: KVCapsule.from_pretrained("reference"),
        "heads 0.4": lambda: KVCapsule.from_pretrained(heads),
        "heads-int4 0.15": lambda: KVCapsule.from_pretrained(heads).with_retained(0.15).with_bits(4),
    }.get(name, lambda: None)()


def measured(name: str, batch: int, images: int, threads: int) -> dict[str, Any]:
    """Peaks in this process, bytes; what loads only once is there already."""
    torch.set_num_threads(threads)
    model, processor = load_reference_vlm()
    inputs = batch_inputs(processor, list(reference_items("test", images, batch)))
    asked = {**inputs, "max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}
    room = inputs["input_ids"].shape[1] + NEW + 1
    until: list[int] = []  # peak up to the text layers

    def text_begins(*_: Any) -> None:
        if not until:
            until.append(_status("VmHWM"))
            _mark()

    model.get_decoder().layers[0].register_forward_pre_hook(text_begins)

    def generate() -> Any:
        method = method_of(name)
        stock = {} if method else {"past_key_values": stock_cache(name, model.config, room)}
        with enable(model, capsule=method) as fast:
            return fast.generate(**asked, **stock, return_dict_in_generate=True).past_key_values

    generate()
    _settle()
    until.clear()
    before = _status("VmRSS")
    _mark()
    cache = generate()
    peak = _status("VmHWM")
    _settle()
    held = _status("VmRSS")
    del cache
    return {
        "cache": name,
        "peak_bytes": max(peak, *until) - before,
        "text_peak_bytes": peak - before,
        "held_bytes": held - before,
    }


def _settle() -> None:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def _mark() -> None:
    (_PROCESS / "clear_refs").write_text("5")  # sets the high-water mark back


def _status(name: str) -> int:
    lines = (_PROCESS / "status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def cells(rows: list[dict[str, Any]]) -> list[list[str]]:
    """The table."""
    keys = "peak_bytes", "text_peak_bytes", "held_bytes"
    return [[row["cache"], *(human_bytes(max(0, row[key])) for key in keys)] for row in rows]


def main(
    batch: Annotated[int, typer.Option(min=1, help="Rows.")] = 8,
    images: Annotated[int, typer.Option(min=1, help="Images of a row.")] = 8,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 2,
    one: Annotated[
        str | None, typer.Option(parser=one_of(*CACHES), help="Measure this cache, here, and print JSON.")
    ] = None,
    json_file: Annotated[Path, typer.Option("--json", help="Write the numbers here.")] = RESULT,
) -> None:
    """Measure and print a table in markdown."""
    if not (_PROCESS / "clear_refs").exists():
        raise typer.BadParameter("resident memory is counted on Linux only")
    if one is not None:
        print(json.dumps(measured(one, batch, images, threads)))
        return
    json_file.parent.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(threads)  # for `machine`
    given = "--batch", str(batch), "--images", str(images), "--threads", str(threads)
    own = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 16)}
    rows = []
    for name in CACHES:
        command = [sys.executable, __file__, "--one", name, *given]
        done = subprocess.run(command, env=own, check=True, stdout=subprocess.PIPE, text=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
    setup = {"batch": batch, "images": images, "new_tokens": NEW}
    json_file.write_text(
        json.dumps({"machine": machine("cpu"), "setup": setup, "rows": rows}, indent=1) + "\n"
    )
    Console().print("\n".join(table(HEADS, cells(rows))), soft_wrap=True, highlight=False)


if __name__ == "__main__":
    typer.run(main)
