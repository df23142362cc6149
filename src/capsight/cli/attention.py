"""`capsight attention`: what chosen heads attend to over several images, beside their category's mask."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from capsight.blindsight import HeadMap
from capsight.blindsight.draw import draw_attention
from capsight.cli.models import REFERENCE, check_out, load_model
from capsight.cli.options import picture_item
from capsight.errors import OptionError
from capsight.evaluation import reference_items
from capsight.evaluation.asking import process


def attention(
    head_map: Annotated[str, typer.Option(help="Head map: folder, hub id, or 'reference'.")],
    out: Annotated[Path, typer.Option(help="PNG to write.")] = Path("attention.png"),
    head: Annotated[list[str] | None, typer.Option(help="LAYER,HEAD; give the option for each.")] = None,
    model: Annotated[str, typer.Option(help="'reference', a folder or a hub id.")] = REFERENCE,
    image: Annotated[list[Path] | None, typer.Option(help="Images; the reference task has its own.")] = None,
    prompt: Annotated[str, typer.Option(help="What to ask about the images.")] = "Compare the images.",
) -> None:
    """Draw attention over a real multi-image prompt, with image boundaries, category and mask."""
    check_out(out)
    heads = [_pair(text) for text in head or ("0,0",)]
    chosen = HeadMap.from_pretrained(head_map)
    vlm, processor = load_model(model)
    if image:
        item = picture_item(image, prompt)
    elif model == REFERENCE:
        item = next(iter(reference_items("calibration", 4, 1)))
    else:
        raise OptionError("name two images or more with --image")
    draw_attention(vlm, process(processor, item, [item.asks[0].question]), heads, chosen, out)
    Console().print(f"picture: {out}")


def _pair(text: str) -> tuple[int, int]:
    try:
        layer, head = (int(part) for part in text.split(","))
    except ValueError as error:
        raise OptionError(f"head is {text!r}; give LAYER,HEAD such as 3,5") from error
    return layer, head
