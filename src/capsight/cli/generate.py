"""`capsight generate`: one answer about some images, with capsules."""

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
    RetainedOption,
    chosen_capsule,
    picture_item,
)
from capsight.cli.output import cache_bytes, note
from capsight.errors import OptionError
from capsight.evaluation import ask_item
from capsight.reference.wording import HINT, is_task_question
from capsight.runtime import check_decode, enable


def generate(
    prompt: Annotated[str, typer.Option(help="What to ask.")],
    image: Annotated[list[Path] | None, typer.Option(help="An image; give the option once for each.")] = None,
    model: ModelOption = REFERENCE,
    capsule: Annotated[
        str | None, typer.Option(help="'reference', a folder, a hub id, or 'none' for the full cache.")
    ] = None,
    retained: RetainedOption = None,
    compression_ratio: CompressionOption = None,
    bits: BitsOption = None,
    decode: Annotated[
        str | None,
        typer.Option(
            help="materialise: capsules are rebuilt; latent: attention reads them as they are. By default "
            "what suits the capsule."
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens of the answer.")] = 64,
    protocol: Annotated[
        str, typer.Option(help="within: images and question in one prefill; after: question over capsules.")
    ] = "within",
    processor: ProcessorOption = None,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
) -> None:
    """Answer a prompt about images, keeping vision KV as capsules."""
    if max_new_tokens < 1:
        raise OptionError(f"max-new-tokens is {max_new_tokens}; it must be at least 1")
    way = None if decode is None else check_decode(decode)
    if capsule == "none" and (retained, compression_ratio, bits) != (None, None, None):
        raise OptionError("--capsule none is the full cache; leave out --retained and --bits")
    item = picture_item(image or (), prompt)
    loaded = None if capsule == "none" else chosen_capsule(capsule, model, retained, bits, compression_ratio)
    vlm, vlm_processor = load_model(model, dtype, device, processor)
    with enable(vlm, capsule=loaded, decode=way) as fast, torch.no_grad():
        answers = ask_item(fast, vlm_processor, item, protocol, max_new_tokens)
    print(answers.texts[0])
    if model == REFERENCE and not is_task_question(prompt):
        note(HINT)
    note(cache_bytes(answers.nbytes))
