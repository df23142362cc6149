"""`capsight bench`: time to first token, decode speed and KV bytes, each method beside the full cache."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from capsight.cli.evaluate import calibration_prompts
from capsight.cli.methods import METHOD_NAMES, make_methods
from capsight.cli.models import REFERENCE, check_out, load_capsule, load_model
from capsight.cli.output import human_bytes, write_json
from capsight.errors import OptionError
from capsight.evaluation.bench import BenchRow, bench


def bench_command(
    model: Annotated[str, typer.Option(help="'reference', a folder or a hub id.")] = REFERENCE,
    capsule: Annotated[str | None, typer.Option(help="'reference', a folder or a hub id.")] = None,
    method: Annotated[
        list[str] | None, typer.Option(help=f"{', '.join(METHOD_NAMES)}; 'full' is always there.")
    ] = None,
    retained: Annotated[list[float] | None, typer.Option(help="Retained fractions.")] = None,
    batch: Annotated[str, typer.Option(help="Batch sizes, comma-separated.")] = "1,4",
    images: Annotated[str, typer.Option(help="Image counts, comma-separated.")] = "1,8",
    new_tokens: Annotated[int, typer.Option(help="Tokens to generate per row.")] = 32,
    runs: Annotated[int, typer.Option(help="Counted runs, after one that warms up.")] = 3,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
    json: Annotated[Path | None, typer.Option(help="Write the figures to this file.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    device: Annotated[str, typer.Option(help="Torch device.")] = "cpu",
) -> None:
    """Time methods on prompts of the reference task; ratios are against the full cache in the same run."""
    check_out(json)
    if new_tokens < 2 or runs < 1:
        raise OptionError("new-tokens must be at least 2 and runs at least 1")
    batches, counts = _numbers("batch", batch), _numbers("images", images)
    torch.set_num_threads(threads)
    vlm, processor = load_model(model, dtype, device)
    methods = [
        (made, rho)
        for rho in retained or [0.4]
        for made in make_methods(
            method or ["adaptive"],
            [rho],
            lambda: load_capsule(capsule, model),
            lambda: calibration_prompts(processor, model, None),
            vlm,
        ).values()
    ]
    rows: list[BenchRow] = []
    with Progress(transient=True) as progress:
        bar = progress.add_task("timing", total=len(batches) * len(counts) * (1 + len(methods)))
        for row in bench(vlm, processor, methods, batches, counts, new_tokens, runs):
            rows.append(row)
            progress.advance(bar)
    _print(rows)
    write_json(json, {"model": model, "rows": [row.to_dict() for row in rows]})


def _numbers(name: str, text: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError as error:
        raise OptionError(f"{name} is {text!r}; give numbers such as 1,8") from error
    if min(numbers) < 1:
        raise OptionError(f"{name} is {text!r}; numbers must be at least 1")
    return numbers


def _print(rows: list[BenchRow]) -> None:
    table = Table()
    table.add_column("method", no_wrap=True)
    for column in ("images", "batch", "tokens", "first token", "tokens/s", "KV"):
        table.add_column(column, justify="right")
    full = rows[0]
    for row in rows:
        if row.retained is None:
            full = row
        kept = row.kv_bytes + row.module_bytes
        table.add_row(
            row.method if row.retained is None else f"{row.method} {row.retained:g}",
            str(row.images),
            str(row.batch),
            str(row.prompt_tokens),
            f"{row.ttft_s * 1e3:.0f} ms ({row.ttft_s / full.ttft_s:.2f}x)",
            f"{row.tokens_per_s:.0f} ({row.tokens_per_s / full.tokens_per_s:.2f}x)",
            f"{human_bytes(kept)} ({kept / full.kv_bytes:.2f}x)",
        )
    Console().print(table)
