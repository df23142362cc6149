"""`capsight encapsulate`: images read once and kept in a file, for `capsight ask`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from capsight.cli.models import REFERENCE, check_out, load_model
from capsight.cli.options import BitsOption, CompressionOption, RetainedOption, chosen_capsule, picture_item
from capsight.cli.output import human_bytes
from capsight.evaluation.asking import process
from capsight.runtime import enable


def encapsulate(
    image: Annotated[list[Path], typer.Option(help="An image; give the option once for each.")],
    out: Annotated[Path, typer.Option(help="File to write, usually *.safetensors.")],
    model: Annotated[str, typer.Option(help="'reference', a folder or a hub id.")] = REFERENCE,
    capsule: Annotated[str | None, typer.Option(help="'reference', a folder or a hub id.")] = None,
    retained: RetainedOption = None,
    compression_ratio: CompressionOption = None,
    bits: BitsOption = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    device: Annotated[str, typer.Option(help="Torch device.")] = "cpu",
) -> None:
    """Read images once and write their capsules to a file; `capsight ask` answers questions from it."""
    check_out(out)
    item = picture_item(image)
    chosen = chosen_capsule(capsule, model, retained, bits, compression_ratio)
    vlm, processor = load_model(model, dtype, device)
    inputs = process(processor, item, [""])
    with enable(vlm, capsule=chosen) as fast, torch.no_grad():
        cache = fast.encapsulate(**{name: value.to(vlm.device) for name, value in inputs.items()})
        fast.save(out)
    Console().print(
        f"{cache.get_seq_length()} tokens of {len(image)} images -> {out} "
        f"(KV cache {human_bytes(cache.nbytes)}, full {human_bytes(cache.nbytes_full)})"
    )
