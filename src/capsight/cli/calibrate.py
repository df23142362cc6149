"""`capsight calibrate`: give every attention head of a model its category, once."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from capsight.blindsight import BlindSight, HeadMap, MaskOptions, Questions, prompts
from capsight.blindsight.calibrate.run import TOLERANCE, check_options
from capsight.blindsight.draw import draw_head_map
from capsight.blindsight.head_map_file import FILE_NAME
from capsight.cli.fit import calibration_items
from capsight.cli.models import REFERENCE, load_model
from capsight.cli.options import DeviceOption, DtypeOption, ModelOption, ProcessorOption
from capsight.cli.output import console
from capsight.cli.target import check_folder
from capsight.errors import LayoutError, OptionError
from capsight.evaluation import Item, reference_items
from capsight.evaluation.asking import process, split_questions
from capsight.model_fingerprint import model_fingerprint

PICTURE = "head_map.png"
REFERENCE_IMAGES = (2, 4, 6, 8)
"""Image counts of the reference task's calibration prompts."""


def calibrate(
    out: Annotated[Path, typer.Option(help="Folder to write the head map to.")],
    model: ModelOption = REFERENCE,
    data: Annotated[
        Path | None,
        typer.Option(
            help="JSONL of {images, question}, two images or more a line; the reference task has its own."
        ),
    ] = None,
    criterion: Annotated[
        str,
        typer.Option(
            help="distribution, output or mass. distribution judges best and takes gradients; without the "
            "memory for them it is slow: then take --unit kv_group or layer, or output."
        ),
    ] = "distribution",
    unit: Annotated[str, typer.Option(help="What has one category: head, kv_group or layer.")] = "head",
    alpha: Annotated[
        str | None,
        typer.Option(
            help="What a category may lose, in the criterion's unit; FIRST,LAST is linear in depth. "
            "Without it, as much as the tolerance allows."
        ),
    ] = None,
    tolerance: Annotated[float, typer.Option(help="Share of held-out answers that may change.")] = TOLERANCE,
    sink_tokens: Annotated[int, typer.Option(help="Vision tokens of an image that are sinks.")] = 1,
    own_window: Annotated[int, typer.Option(help="How far Sink heads see into their own image.")] = 32,
    samples: Annotated[int, typer.Option(help="Calibration prompts that the categories are taken from.")] = 8,
    held_out: Annotated[int, typer.Option(help="Others that measure how many answers change.")] = 24,
    processor: ProcessorOption = None,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
) -> None:
    """Calibrate a head map for sparse prefill and write it, with a picture, to a folder."""
    check_options(criterion, unit, tolerance)
    check_folder(out, FILE_NAME, PICTURE)
    options, ends = MaskOptions(sink_tokens=sink_tokens, own_window=own_window), _alpha(alpha)
    vlm, vlm_processor = load_model(model, dtype, device, processor)
    items = [item for item in _items(model, data, samples, held_out) if len(item.images) > 1]
    voting, measuring = split(items, samples, held_out)
    began = time.perf_counter()
    head_map = BlindSight.calibrate(
        vlm,
        vlm_processor,
        [process(vlm_processor, item, [item.asks[0].question]) for item in voting],
        criterion=criterion,  # type: ignore[arg-type]
        unit=unit,  # type: ignore[arg-type]
        alpha=ends,
        options=options,
        tolerance=tolerance,
        held_out=(_all_questions(vlm, vlm_processor, item) for item in measuring),
        fingerprint=model_fingerprint(vlm),
    )
    head_map.save_pretrained(out)
    draw_head_map(head_map, out / PICTURE)
    seconds = time.perf_counter() - began
    summary = f"{len(voting)} prompts voted, {len(measuring)} were held out, {seconds:.0f} s -> {out}"
    console().print(f"{summary}\n{_summary(head_map)}", soft_wrap=True)


def split(items: list[Item], samples: int, held_out: int) -> tuple[list[Item], list[Item]]:
    """Items that vote, and items held out, in this proportion, both spread evenly over all of them."""
    total = samples + held_out
    is_held_out = [(i + 1) * held_out // total > i * held_out // total for i in range(len(items))]
    sides = list(zip(items, is_held_out, strict=True))
    return [item for item, aside in sides if not aside], [item for item, aside in sides if aside]


def _items(model: str, data: Path | None, samples: int, held_out: int) -> list[Item]:
    if samples < 1 or held_out < 1:
        raise OptionError(f"samples is {samples} and held-out {held_out}; both must be at least 1")
    if model != REFERENCE or data is not None:
        return calibration_items(model, data, samples + held_out)
    each = -(-(samples + held_out) // len(REFERENCE_IMAGES))
    return [item for count in REFERENCE_IMAGES for item in reference_items("calibration", count, each)]


def _all_questions(model: Any, processor: Any, item: Item) -> Questions | dict[str, Any]:
    """The images and the questions after them, or a row for each question where one comes before."""
    asked = [ask.question for ask in item.asks]
    try:
        images, tails = split_questions(model, processor, item, asked)
    except LayoutError:
        return process(processor, item, asked)
    return Questions(next(prompts(model, None, [images])), tuple(map(tuple, tails)))


def _alpha(text: str | None) -> float | tuple[float, float] | None:
    if text is None:
        return None
    try:
        ends = [float(part) for part in text.split(",")]
        if len(ends) > 2:
            raise ValueError("too many numbers")
        return (ends[0], ends[1]) if len(ends) == 2 else ends[0]
    except ValueError as error:
        raise OptionError(f"alpha is {text!r}; give a number, or FIRST,LAST such as 0.1,0.3") from error


def _summary(head_map: HeadMap) -> str:
    counts = ", ".join(f"{count} {category}" for category, count in head_map.counts().items() if count)
    record = head_map.calibration
    if record is None or record.measured_drop is None:
        return counts
    return f"{counts}; {record.recovered} returned to dense, {record.measured_drop:.1%} of answers change"
