"""`capsight bench`: speed, memory and what methods cost to make, each beside the full cache."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import cache
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from capsight.baselines import METHODS
from capsight.cli.evaluate import calibration_prompts
from capsight.cli.methods import CAPSULES, METHOD_NAMES, make_methods
from capsight.cli.models import REFERENCE, load_capsule, load_model
from capsight.cli.options import (
    CompressionsOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelOption,
    ProcessorOption,
    shares,
)
from capsight.cli.output import console, human_bytes, parse_bytes, write_json
from capsight.cli.target import check_out
from capsight.errors import OptionError
from capsight.evaluation import FULL
from capsight.evaluation.bench import bench, variants
from capsight.evaluation.bench_row import BenchRow
from capsight.kvcapsule import KVCapsule
from capsight.runtime import check_decode

_FIT_PROMPTS = 8
"""Prompts that methods without a file are fitted to; time and bytes do not depend on the fit."""


def bench_command(
    model: ModelOption = REFERENCE,
    capsule: Annotated[
        str | None,
        typer.Option(help="'reference', a folder or a hub id; without one for another model, one is fitted."),
    ] = None,
    method: Annotated[
        list[str] | None, typer.Option(help=f"{', '.join(METHOD_NAMES)}; 'full' is always there.")
    ] = None,
    retained: Annotated[list[float] | None, typer.Option(help="Retained fractions.")] = None,
    compression_ratio: CompressionsOption = None,
    decode: Annotated[
        list[str] | None,
        typer.Option(
            help="materialise or latent, of methods with capsules; give the option for each. By default what "
            "suits the method."
        ),
    ] = None,
    compiled: Annotated[
        bool, typer.Option(help="Also time compiled decode steps, where they can be; takes minutes on CPUs.")
    ] = False,
    batch: Annotated[str, typer.Option(help="Batch sizes, comma-separated.")] = "1,4",
    images: Annotated[str, typer.Option(help="Image counts, comma-separated.")] = "1,8",
    new_tokens: Annotated[int, typer.Option(help="Tokens to generate per row.")] = 32,
    runs: Annotated[int, typer.Option(help="Counted runs, after one that warms up.")] = 3,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
    kv_budget: Annotated[
        str | None, typer.Option(help="Also say the largest batch that fits, such as 512MB.")
    ] = None,
    calibrate: Annotated[
        int, typer.Option(help="Also time fitting the methods to so many prompts; 0: do not.")
    ] = 0,
    json: JsonOption = None,
    processor: ProcessorOption = None,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
) -> None:
    """Time methods on prompts of the reference task; ratios are against the full cache in the same run.

    Those of decode speed are against the full cache that decodes fastest, of those that are timed.
    """
    check_out(json)
    if new_tokens < 2 or runs < 1 or threads < 1 or calibrate < 0:
        raise OptionError("new-tokens must be at least 2, runs and threads at least 1, calibrate at least 0")
    ways = [check_decode(name) for name in decode or []]
    batches, counts = _numbers("batch", batch), _numbers("images", images)
    budget = None if kv_budget is None else parse_bytes(kv_budget)
    torch.set_num_threads(threads)
    fractions = shares(retained, compression_ratio)
    vlm, vlm_processor = load_model(model, dtype, device, processor)
    names = method or ["joint"]

    @cache
    def prompts() -> list[Any]:
        return calibration_prompts(vlm_processor, REFERENCE, None, _FIT_PROMPTS)

    @cache
    def loaded() -> KVCapsule:
        if capsule is None and model != REFERENCE:
            return KVCapsule.fit(vlm, None, prompts())
        return load_capsule(capsule, model)

    timed = variants(make_methods(names, fractions, loaded, prompts, vlm), ways, compiled)
    fits = calibration_seconds(names, vlm, vlm_processor, calibrate) if calibrate else []
    rows: list[BenchRow] = []
    out = console(json)
    with Progress(transient=True, console=out) as progress:
        bar = progress.add_task("timing", total=len(batches) * len(counts) * len(timed))
        for row in bench(vlm, vlm_processor, timed, batches, counts, new_tokens, runs):
            rows.append(row)
            progress.advance(bar)
    results = _with_ratios(rows, budget)
    named = str(vlm.dtype).removeprefix("torch.")
    values = {"model": model, "dtype": named, "runs": runs, "new_tokens": new_tokens, "kv_budget": budget}
    try:
        write_json(json, values | {"rows": results, "calibration": fits})
    finally:
        _print(out, results, fits, kv_budget)


def calibration_seconds(
    names: Sequence[str], model: Any, processor: Any, prompts: int
) -> list[dict[str, Any]]:
    """Seconds that fitting takes for every method that is fitted; one run each, model loaded."""
    samples = calibration_prompts(processor, REFERENCE, None)[:prompts]
    timings = []
    for name in names:
        began = time.perf_counter()
        if name in CAPSULES:
            form = CAPSULES[name]
            form.of(KVCapsule.fit(model, None, samples, codec=form.codec, progress=False))
        elif name in METHODS and METHODS[name].calibrated:
            kind: Any = METHODS[name]
            kind.fit(model, None, samples, progress=False)
        else:
            continue
        timings.append({"method": name, "prompts": len(samples), "seconds": time.perf_counter() - began})
    return timings


def _numbers(name: str, text: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError as error:
        raise OptionError(f"{name} is {text!r}; give numbers such as 1,8") from error
    if min(numbers) < 1:
        raise OptionError(f"{name} is {text!r}; numbers must be at least 1")
    return numbers


def _with_ratios(rows: Sequence[BenchRow], budget: int | None) -> list[dict[str, Any]]:
    """Rows with what they are beside the full cache, and the batch that a budget allows."""
    results = []
    for row in rows:
        fulls = [r for r in rows if r.method == FULL and (r.batch, r.images) == (row.batch, row.images)]
        fastest = max(fulls, key=lambda r: r.tokens_per_s)
        values = row.to_dict() | {"name": row.name, "ratios": row.ratios(fulls[0], fastest)}
        results.append(values if budget is None else values | {"largest_batch": row.largest_batch(budget)})
    return results


def _print(out: Console, rows: list[dict[str, Any]], fits: list[dict[str, Any]], budget: str | None) -> None:
    """Speed and memory, a table each, so that both fit a terminal."""
    speed, memory = Table(title="speed"), Table(title="memory")
    columns = ["KV", "states"] if any(row["state_bytes"] for row in rows) else ["KV"]
    for table, heads in (
        (speed, ["first token, ms", "ratio", "encode, ms", "tokens/s", "ratio"]),
        (memory, [*columns, "ratio", "peak", *([] if budget is None else [f"rows in {budget}"])]),
    ):
        table.add_column("method", no_wrap=True)
        for head in ("images", "batch", *heads):
            table.add_column(head, justify="right")
    for row in rows:
        ratios, front = row["ratios"], (row["name"], str(row["images"]), str(row["batch"]))
        speed.add_row(
            *front,
            f"{row['ttft_s'] * 1e3:.0f}",
            f"{ratios['ttft']:.2f}",
            f"{row['encode_s'] * 1e3:.1f}",
            f"{row['tokens_per_s']:.0f}",
            f"{ratios['tokens_per_s']:.2f}",
        )
        memory.add_row(
            *front,
            human_bytes(row["kv_bytes"] + row["module_bytes"]),
            *([human_bytes(row["state_bytes"])] if len(columns) > 1 else []),
            f"{ratios['bytes']:.2f}",
            "" if row["peak_bytes"] is None else human_bytes(row["peak_bytes"]),
            *([] if budget is None else [str(row["largest_batch"])]),
        )
    out.print(speed)
    out.print(memory)
    for fit in fits:
        each = fit["seconds"] / fit["prompts"]
        out.print(f"fitting {fit['method']}: {fit['seconds']:.1f} s, {each:.2f} s a prompt")
