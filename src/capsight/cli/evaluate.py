"""`capsight eval`: accuracy of methods beside the full cache, on the reference task or on user data."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from capsight.cli.fit import calibration_items
from capsight.cli.methods import METHOD_NAMES, make_methods
from capsight.cli.models import REFERENCE, check_out, load_capsule, load_model
from capsight.cli.output import human_bytes, write_json
from capsight.errors import OptionError
from capsight.evaluation import Item, evaluate, jsonl_items, reference_items, summary
from capsight.evaluation.asking import process

_CALIBRATION_PROMPTS = 96  # as `capsight fit` takes by default


def evaluate_command(
    model: Annotated[str, typer.Option(help="'reference', a folder or a hub id.")] = REFERENCE,
    capsule: Annotated[str | None, typer.Option(help="'reference', a folder or a hub id.")] = None,
    method: Annotated[
        list[str] | None, typer.Option(help=f"{', '.join(METHOD_NAMES)}; 'full' is always there.")
    ] = None,
    retained: Annotated[
        list[float] | None, typer.Option(help="Retained fractions; repeat for several.")
    ] = None,
    protocol: Annotated[str, typer.Option(help="after (the judge) or within.")] = "after",
    images: Annotated[
        str, typer.Option(help="Image counts of the reference task, comma-separated.")
    ] = "1,4,8",
    samples: Annotated[
        int, typer.Option(help="Prompts per image count (six questions each), or lines.")
    ] = 100,
    data: Annotated[Path | None, typer.Option(help="JSONL of {images, question, answer} instead.")] = None,
    calibration: Annotated[
        Path | None, typer.Option(help="Pictures or JSONL to fit calibrated baselines to (feature-pca).")
    ] = None,
    json: Annotated[Path | None, typer.Option(help="Write the figures to this file.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    device: Annotated[str, typer.Option(help="Torch device.")] = "cpu",
) -> None:
    """Exact match, agreement and KL against the full cache, and KV bytes."""
    check_out(json)
    vlm, processor = load_model(model, dtype, device)
    items, total = _items(model, data, images, samples)
    methods = make_methods(
        method or [],
        retained or [0.4],
        lambda: load_capsule(capsule, model),
        lambda: calibration_prompts(processor, model, calibration),
        vlm,
    )
    with Progress(transient=True) as progress:
        bar = progress.add_task("prompts", total=total)
        results = evaluate(
            vlm,
            processor,
            items,
            methods,
            protocol,
            lambda *_: progress.advance(bar),
        )
    report = summary(results)
    print_report(Console(), report, f"{model}, protocol {protocol}")
    write_json(json, {"model": model, "protocol": protocol, "samples": samples, "methods": report})


def _items(model: str, data: Path | None, images: str, samples: int) -> tuple[Iterable[Item], int | None]:
    if samples < 1:
        raise OptionError(f"samples is {samples}; it must be at least 1")
    if data is not None:
        rows = [item for item, _ in zip(jsonl_items(data), range(samples), strict=False)]
        return rows, len(rows)
    if model != REFERENCE:
        raise OptionError("name the questions with --data: the built-in task is the reference VLM's")
    try:
        counts = [int(c) for c in images.split(",")]
    except ValueError as error:
        raise OptionError(f"images is {images!r}; give counts such as 1,4,8") from error
    if min(counts) < 1:
        raise OptionError(f"images is {images!r}; counts must be at least 1")
    return (item for c in counts for item in reference_items("test", c, samples)), samples * len(counts)


def calibration_prompts(processor: Any, model: str, data: Path | None) -> list[Any]:
    """Processor outputs to fit methods to: the user's, or the calibration split of the reference task."""
    if data is None and model != REFERENCE:
        raise OptionError("name data to fit the method to with --calibration: pictures or a JSONL file")
    items = calibration_items(model, data, _CALIBRATION_PROMPTS)
    return [process(processor, item, [item.asks[0].question]) for item in items]


def print_report(console: Console, report: dict[str, Any], title: str) -> None:
    """Two tables: the methods, and the full cache's accuracy by task and image count."""
    table = Table(title=title)
    table.add_column("method", no_wrap=True)
    for column in ("exact match %", "drop (p)", "agree %", "KL", "KV cache"):
        table.add_column(column, justify="right")
    for name, row in report.items():
        share = row["kv_bytes"] / row["kv_bytes_full"] if row["kv_bytes_full"] else 1.0
        low, high = row["interval"]
        table.add_row(
            name,
            f"{row['exact_match']:.1f} ({low:.0f}-{high:.0f})",
            f"{row['drop']:+.1f} ({row['p_value']:.3f})" if name != "full" else "",
            f"{row['agreement']:.1f}",
            f"{row['kl']:.4f}",
            f"{human_bytes(row['kv_bytes'])} ({share:.2f}x)",
        )
    console.print(table)
    names = list(report)
    for label in ("images", "task"):
        groups = report[names[0]]["by"].get(label, {})
        detail = Table(title=f"exact match by {label}, %")
        detail.add_column(label, no_wrap=True)
        for column in (*names, "questions"):
            detail.add_column(column, justify="right")
        for value, cell in groups.items():
            row = [f"{report[n]['by'][label][value]['exact_match']:.1f}" for n in names]
            detail.add_row(value, *row, str(cell["questions"]))
        console.print(detail)
