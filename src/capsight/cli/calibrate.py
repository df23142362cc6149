"""`capsight calibrate`: give every attention head of a model its category, once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from capsight.blindsight import BlindSight
from capsight.blindsight.draw import draw_head_map
from capsight.cli.fit import calibration_items
from capsight.cli.models import REFERENCE, load_model
from capsight.evaluation.asking import process
from capsight.kvcapsule.fingerprint import model_fingerprint


def calibrate(
    out: Annotated[Path, typer.Option(help="Folder to write the head map to.")],
    model: Annotated[str, typer.Option(help="'reference', a folder or a hub id.")] = REFERENCE,
    data: Annotated[
        Path | None, typer.Option(help="JSONL of {images, question} with two images or more a line.")
    ] = None,
    criterion: Annotated[str, typer.Option(help="output, mass or distribution.")] = "output",
    tolerance: Annotated[
        float, typer.Option(help="Share of next tokens after the images that may change on held-out prompts.")
    ] = 0.01,
    samples: Annotated[int, typer.Option(help="Calibration prompts to use at most.")] = 48,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    device: Annotated[str, typer.Option(help="Torch device.")] = "cpu",
) -> None:
    """Calibrate a head map for sparse prefill and write it, with a picture, to a folder."""
    vlm, processor = load_model(model, dtype, device)
    items = calibration_items(model, data, samples)
    prompts = [process(processor, item, [item.asks[0].question]) for item in items if len(item.images) > 1]
    head_map = BlindSight.calibrate(
        vlm,
        processor,
        prompts,
        criterion=criterion,  # type: ignore[arg-type]
        tolerance=tolerance,
        fingerprint=model_fingerprint(vlm),
    )
    head_map.save_pretrained(out)
    draw_head_map(head_map, out / "head_map.png")
    counts = ", ".join(f"{count} {category}" for category, count in head_map.counts().items() if count)
    Console().print(f"{len(prompts)} prompts -> {out}: {counts}")
