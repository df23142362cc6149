"""`capsight fit`: fit a capsule to a model in one calibration pass."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer

from capsight.cli.models import REFERENCE, load_model
from capsight.cli.options import CompressionOption, DeviceOption, DtypeOption, ModelOption, ProcessorOption
from capsight.cli.output import console, human_bytes
from capsight.cli.target import check_folder
from capsight.errors import OptionError
from capsight.evaluation import Item, jsonl_items, reference_items
from capsight.evaluation.asking import process
from capsight.kvcapsule import KVCapsule
from capsight.kvcapsule.calibration.fit_journal import remove_journal
from capsight.kvcapsule.calibration.processes import Processes, join_launched
from capsight.kvcapsule.store import HEADER_FILE
from capsight.pictures import open_image

_PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".jp2"}


def fit(
    out: Annotated[Path, typer.Option(help="Folder to write the capsule to.")],
    model: ModelOption = REFERENCE,
    data: Annotated[
        Path | None,
        typer.Option(
            help="Folder of pictures, or JSONL of {images, question}; the reference task has its own."
        ),
    ] = None,
    retained: Annotated[
        float | None,
        typer.Option(
            help="Part of a 16-bit cache's bytes (joint, 0.05), of each block's tokens (others, 0.40)."
        ),
    ] = None,
    compression_ratio: CompressionOption = None,
    codec: Annotated[
        str, typer.Option(help="joint, heads, adaptive, evict, static or static-mlp.")
    ] = "joint",
    samples: Annotated[int, typer.Option(help="Calibration prompts to use at most.")] = 96,
    processor: ProcessorOption = None,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
) -> None:
    """Fit a capsule to a model and write it to a folder; run again, it goes on where it was interrupted.

    Processes that `torchrun -m capsight fit ...` or `accelerate launch -m capsight fit ...` start share the
    prompts out.
    """
    join_launched()
    processes = Processes.launched()
    with processes.together():
        check_folder(out, HEADER_FILE)
        vlm, vlm_processor = load_model(model, dtype, device, processor)
        prompts = _Prompts(vlm_processor, calibration_items(model, data, samples))
    began = time.perf_counter()
    partial = out.with_name(f"{out.name}.partial")
    capsule = KVCapsule.fit(
        vlm,
        vlm_processor,
        prompts,
        retained,
        codec=codec,
        compression_ratio=compression_ratio,
        resume=partial,
    )
    if processes.rank:
        return
    capsule.save_pretrained(out)
    remove_journal(partial)
    console().print(
        f"{len(prompts)} prompts in {time.perf_counter() - began:.0f} s -> {out} "
        f"({human_bytes(capsule.module_nbytes)}, break-even at {capsule.break_even_tokens()} vision tokens)",
        soft_wrap=True,
    )


def calibration_items(model: str, data: Path | None, samples: int) -> list[Item]:
    """Calibration prompts: the user's, or those of the reference task's calibration split (1 to 8 images).

    Raises:
        OptionError: no data is named for a model other than the reference, or there is none.
    """
    if samples < 1:
        raise OptionError(f"samples is {samples}; it must be at least 1")
    if data is None:
        if model != REFERENCE:
            raise OptionError("name calibration data with --data: a folder of pictures or a JSONL file")
        counts = (1, 2, 4, 8)
        return [i for c in counts for i in reference_items("calibration", c, -(-samples // len(counts)))][
            :samples
        ]
    items = list(islice(_folder_items(data) if data.is_dir() else jsonl_items(data), samples))
    if not items:
        raise OptionError(f"{data} holds no pictures or lines to calibrate with")
    return items


class _Prompts(Sequence[Mapping[str, Any]]):
    """Processor outputs, each made when it is read."""

    def __init__(self, processor: Any, items: list[Item]) -> None:
        self._processor, self._items = processor, items

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: Any) -> Any:
        item = self._items[index]
        return process(self._processor, item, [item.asks[0].question])


def is_picture(path: Path) -> bool:
    """Whether it is a file named as a picture, and not a hidden one such as macOS's `._a.png`."""
    return path.suffix.lower() in _PICTURES and not path.name.startswith(".") and path.is_file()


def _folder_items(folder: Path) -> Iterable[Item]:
    from capsight.evaluation import Ask

    for path in sorted(p for p in folder.iterdir() if is_picture(p)):
        yield Item(path.name, (open_image(path),), (Ask("Describe the image.", ""),))
