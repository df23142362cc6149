"""`capsight encapsulate`: images read once and kept, in a file or a store, for `capsight ask`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.progress import Progress

from capsight.cli.fit import is_picture
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
from capsight.cli.output import cache_bytes, console, human_bytes, parse_bytes
from capsight.cli.target import check_folder, check_out
from capsight.errors import OptionError
from capsight.evaluation.asking import process
from capsight.evaluation.cache_bytes import CacheBytes
from capsight.kvcapsule.codecs.entropy import check_coder
from capsight.kvcapsule.rest import DEFAULT_QUALITY, CapsuleStore, check_quality
from capsight.runtime import enable


def encapsulate(
    folder: Annotated[
        Path | None, typer.Argument(help="Folder of pictures, each to be read by itself into --store.")
    ] = None,
    image: Annotated[list[Path] | None, typer.Option(help="An image; give the option once for each.")] = None,
    out: Annotated[Path | None, typer.Option(help="File to write, usually *.safetensors.")] = None,
    store: Annotated[Path | None, typer.Option(help="Folder of a store, which may hold images.")] = None,
    model: ModelOption = REFERENCE,
    capsule: Annotated[str | None, typer.Option(help="'reference', a folder or a hub id.")] = None,
    retained: RetainedOption = None,
    compression_ratio: CompressionOption = None,
    bits: BitsOption = None,
    quality: QualityOption = None,
    nbytes: Annotated[
        str | None, typer.Option("--bytes", help="Instead of --quality: the best that fits, such as 20KB.")
    ] = None,
    processor: ProcessorOption = None,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
) -> None:
    """Read images once and keep their capsules; `capsight ask` answers questions from them."""
    if (out is None) == (store is None):
        raise OptionError("name either --out, a file for all images together, or --store, a folder")
    if store is None and (folder is not None or not image):
        raise OptionError("a file takes images named with --image; a folder of pictures goes to a --store")
    if quality is not None:
        check_quality(quality)
    if nbytes is not None and (quality is not None or out is None):
        raise OptionError("--bytes is of one file, named with --out, and takes the place of --quality")
    most = None if nbytes is None else parse_bytes(nbytes)
    if (quality, most, store) != (None, None, None):
        check_coder()
    check_out(out, must_stay=True, others=image or ())
    paths = [*(image or ()), *(() if folder is None else pictures(folder))]
    if store is not None:
        check_folder(store)
    named = picture_item(image or ())
    chosen = chosen_capsule(capsule, model, retained, bits, compression_ratio)
    vlm, vlm_processor = load_model(model, dtype, device, processor)
    if store is not None:
        _into_store(store, vlm, vlm_processor, paths, chosen, quality or DEFAULT_QUALITY)
        return
    assert out is not None
    inputs = process(vlm_processor, named, [""])
    with enable(vlm, capsule=chosen) as fast, torch.no_grad():
        cache = fast.encapsulate(**{name: value.to(vlm.device) for name, value in inputs.items()})
        fast.save(out, quality, most)
    console().print(
        f"{cache.get_seq_length()} tokens of {len(paths)} images -> {out} (file "
        f"{human_bytes(out.stat().st_size)}, {cache_bytes(CacheBytes.of(cache))})",
        soft_wrap=True,
    )


def pictures(folder: Path) -> list[Path]:
    """The pictures of a folder, by name.

    Raises:
        OptionError: it is no folder, or holds none.
    """
    if not folder.is_dir():
        raise OptionError(f"{folder} is no folder; name one of pictures, or single ones with --image")
    paths = sorted(path for path in folder.iterdir() if is_picture(path))
    if not paths:
        raise OptionError(f"{folder} holds no pictures")
    return paths


def _into_store(
    folder: Path, vlm: Any, vlm_processor: Any, paths: list[Path], capsule: Any, quality: float
) -> None:
    """Read pictures one by one, opened when it is their turn; those before a damaged one are kept."""
    store = CapsuleStore(folder, quality=quality, reuse="anywhere")
    before, full = {file.path for file in store.files()}, 0
    with (
        enable(vlm, capsule=capsule, store=store) as fast,
        torch.no_grad(),
        Progress(console=console(stderr=True), transient=True) as progress,
    ):
        for path in progress.track(paths, description="reading"):
            inputs = process(vlm_processor, picture_item([path]), [""])
            cache = fast.encapsulate(**{name: value.to(vlm.device) for name, value in inputs.items()})
            full += CacheBytes.of(cache).kv_full
    new = [file for file in store.files() if file.path not in before]
    console().print(
        f"{len(paths)} images -> {folder} ({len(new)} new, {human_bytes(sum(f.nbytes for f in new))}; KV "
        f"cache of all, full {human_bytes(full)})",
        soft_wrap=True,
    )
