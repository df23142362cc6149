"""`capsight attention`: what chosen heads attend to over several images, beside their category's mask."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from capsight.blindsight import HeadMap
from capsight.blindsight.draw import draw_attention
from capsight.cli.models import REFERENCE, load_model
from capsight.cli.options import DeviceOption, DtypeOption, ModelOption, ProcessorOption, picture_item
from capsight.cli.output import console
from capsight.cli.target import check_out
from capsight.errors import OptionError
from capsight.evaluation import reference_items
from capsight.evaluation.asking import process, to_device


def attention(
    head_map: Annotated[str, typer.Option(help="Head map: folder, hub id, or 'reference'.")],
    out: Annotated[Path, typer.Option(help="PNG to write.")] = Path("attention.png"),
    head: Annotated[list[str] | None, typer.Option(help="LAYER,HEAD; give the option for each.")] = None,
    model: ModelOption = REFERENCE,
    image: Annotated[list[Path] | None, typer.Option(help="Images; the reference task has its own.")] = None,
    prompt: Annotated[str, typer.Option(help="What to ask about the images.")] = "Compare the images.",
    processor: ProcessorOption = None,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
) -> None:
    """Draw attention over a real multi-image prompt, with image boundaries, category and mask."""
    check_out(out, must_stay=True, others=image or ())
    heads = [_pair(text) for text in head or ("0,0",)]
    chosen = HeadMap.from_pretrained(head_map)
    vlm, vlm_processor = load_model(model, dtype, device, processor)
    if image:
        item = picture_item(image, prompt)
    elif model == REFERENCE:
        item = next(iter(reference_items("calibration", 4, 1)))
    else:
        raise OptionError("name two images or more with --image")
    inputs = to_device(process(vlm_processor, item, [item.asks[0].question]), vlm.device)
    draw_attention(vlm, inputs, heads, chosen, out)
    console().print(f"picture: {out}", soft_wrap=True)


def _pair(text: str) -> tuple[int, int]:
    try:
        layer, head = (int(part) for part in text.split(","))
    except ValueError as error:
        raise OptionError(f"head is {text!r}; give LAYER,HEAD such as 3,5") from error
    return layer, head
