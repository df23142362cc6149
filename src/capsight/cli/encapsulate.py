"""`capsight encapsulate`: images read once and kept in a file, for `capsight ask`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

from capsight.cli.models import REFERENCE, load_model
from capsight.cli.options import (
    BitsOption,
    CompressionOption,
    DeviceOption,
    DtypeOption,
    ModelOption,
    ProcessorOption,
    QualityOption,
    RetainedOption,
    chosen_capsule,
    picture_item,
)
from capsight.cli.output import console, human_bytes
from capsight.cli.target import check_out
from capsight.evaluation.asking import process
from capsight.kvcapsule.rest import check_quality
from capsight.runtime import enable


def encapsulate(
    image: Annotated[list[Path], typer.Option(help="An image; give the option once for each.")],
    out: Annotated[Path, typer.Option(help="File to write, usually *.safetensors.")],
    model: ModelOption = REFERENCE,
    capsule: Annotated[str | None, typer.Option(help="'reference', a folder or a hub id.")] = None,
    retained: RetainedOption = None,
    compression_ratio: CompressionOption = None,
    bits: BitsOption = None,
    quality: QualityOption = None,
    processor: ProcessorOption = None,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
) -> None:
    """Read images once and write their capsules to a file; `capsight ask` answers questions from it."""
    check_out(out)
    if quality is not None:
        check_quality(quality)
    item = picture_item(image)
    chosen = chosen_capsule(capsule, model, retained, bits, compression_ratio)
    vlm, made = load_model(model, dtype, device, processor)
    inputs = process(made, item, [""])
    with enable(vlm, capsule=chosen) as fast, torch.no_grad():
        cache = fast.encapsulate(**{name: value.to(vlm.device) for name, value in inputs.items()})
        fast.save(out, quality)
    console().print(
        f"{cache.get_seq_length()} tokens of {len(image)} images -> {out} (file "
        f"{human_bytes(out.stat().st_size)}, KV cache {human_bytes(cache.nbytes)}, full "
        f"{human_bytes(cache.nbytes_full)})",
        soft_wrap=True,
    )
