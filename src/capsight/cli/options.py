"""Options that several commands share, and the capsule that they name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from capsight.cli.models import load_capsule
from capsight.errors import OptionError
from capsight.evaluation import Ask, Item
from capsight.kvcapsule import KVCapsule
from capsight.kvcapsule.budget import share_to_keep
from capsight.pictures import open_image

OWN_BITS = 16
"""What `--bits` calls numbers in the cache's own dtype."""

ModelOption = Annotated[str, typer.Option(help="'reference', a folder or a hub id.")]
DtypeOption = Annotated[
    str | None,
    typer.Option(help="float32, bfloat16 or float16; by default the checkpoint's (reference: float32)."),
]
DeviceOption = Annotated[
    str | None, typer.Option(help="Torch device; by default the GPU where there is one (CUDA), else cpu.")
]
ProcessorOption = Annotated[
    str | None, typer.Option(help="module:factory of a processor of your own, instead of the checkpoint's.")
]
JsonOption = Annotated[
    Path | None, typer.Option(help="Write the figures to this file; - is the standard output.")
]
RetainedOption = Annotated[float | None, typer.Option(help="Another retained fraction than the capsule's.")]
CompressionOption = Annotated[
    float | None, typer.Option(help="The same as papers give it, 1 - retained; instead of --retained.")
]
CompressionsOption = Annotated[
    list[float] | None, typer.Option(help="The same as papers give it, 1 - retained; instead of --retained.")
]
BitsOption = Annotated[
    int | None,
    typer.Option(
        help="Bits of a stored number: 8, 4, or 16 for the cache's dtype; by default those of the capsule."
    ),
]

QualityOption = Annotated[
    float | None,
    typer.Option(
        help="Write the form for rest, several times smaller: the share of variance that comes back, such as "
        "0.98 (joint codec)."
    ),
]


def shares(retained: list[float] | None, compression_ratio: list[float] | None) -> list[float]:
    """Retained fractions that a command line names in either way.

    Raises:
        OptionError: it names them in both ways, or a ratio is out of range.
    """
    if retained and compression_ratio:
        raise OptionError("give --retained or --compression-ratio (which is 1 - retained), not both")
    return retained or [share_to_keep(None, ratio) for ratio in compression_ratio or ()]


def chosen_capsule(
    source: str | None,
    model: str,
    retained: float | None,
    bits: int | None,
    compression_ratio: float | None = None,
) -> KVCapsule:
    """The capsule that a command line names, with the retained fraction and bits that it names.

    Raises:
        CapsightError: there is none, or it cannot be had so.
    """
    capsule = load_capsule(source, model)
    if (retained, compression_ratio) != (None, None):
        capsule = capsule.with_retained(retained, compression_ratio=compression_ratio)
    return capsule if bits is None else capsule.with_bits(None if bits == OWN_BITS else bits)


def picture_item(paths: Sequence[Path], question: str = "") -> Item:
    """A question about the pictures in some files, named after them.

    Raises:
        OptionError: a file is no picture.
    """
    name = ", ".join(map(str, paths)) or "the prompt"
    return Item(name, tuple(open_image(path) for path in paths), (Ask(question, ""),))
