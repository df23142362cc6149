"""`capsight export`: a checkpoint folder that vLLM serves with capsules and a head map."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

from capsight.blindsight import HeadMap
from capsight.cli.models import REFERENCE, load_config, load_model
from capsight.cli.options import CompressionOption
from capsight.cli.output import console
from capsight.cli.target import check_folder
from capsight.errors import OptionError
from capsight.hub import folder_of
from capsight.kvcapsule import KVCapsule
from capsight.kvcapsule.budget import share_to_keep
from capsight.reference import reference_path
from capsight.serving.export import (
    PATTERNS,
    check_carried,
    check_target,
    checkpoint_files,
    export_checkpoint,
)


def export(
    model: Annotated[str, typer.Argument(help="'reference', a folder or a hub id.")],
    out: Annotated[Path, typer.Option(help="Folder to make.")],
    capsule: Annotated[
        str | None,
        typer.Option(
            help="Capsule of the codec joint: the engine keeps its latents. 'reference', folder, hub id."
        ),
    ] = None,
    head_map: Annotated[
        str | None, typer.Option(help="Head map of the prefill: 'reference', a folder or a hub id.")
    ] = None,
    retained: Annotated[
        float | None,
        typer.Option(
            help="Part of the capsule's bytes to keep, or, without a capsule, of an image's tokens."
        ),
    ] = None,
    compression_ratio: CompressionOption = None,
    overwrite: Annotated[bool, typer.Option(help="Replace what an earlier export wrote there.")] = False,
) -> None:
    """Copy a model with its capsule and head map into a folder for `capsight serve` and `vllm serve`."""
    if (retained, compression_ratio) != (None, None):
        retained = share_to_keep(retained, compression_ratio)
    if (capsule, retained, head_map) == (None, None, None):
        raise OptionError(
            "name --capsule, --retained or --head-map; without them plain vLLM serves the model"
        )
    check_folder(out)
    source = reference_path() if model == REFERENCE else folder_of(model, PATTERNS, "model", {})
    check_target(source, out, overwrite)
    check_carried(load_config(model))
    total = sum(path.stat().st_size for path in checkpoint_files(source))
    fitted = None if capsule is None else KVCapsule.from_pretrained(capsule)
    heads = None if head_map is None else HeadMap.from_pretrained(head_map)
    vlm, _ = load_model(model, device="cpu")
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn()
    with Progress(*columns, console=console(stderr=True), transient=True) as progress:
        task = progress.add_task("copying", total=total)
        export_checkpoint(
            source,
            out,
            vlm,
            capsule=fitted,
            head_map=heads,
            retained=retained,
            overwrite=overwrite,
            copied=lambda size: progress.advance(task, size),
        )
    console().print(f"{model} -> {out}; serve it with: capsight serve {out}", soft_wrap=True)
