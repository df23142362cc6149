"""Options that several commands share, and the capsule that they name."""

from __future__ import annotations

from typing import Annotated

import typer

from capsight.cli.models import load_capsule
from capsight.kvcapsule import KVCapsule
from capsight.kvcapsule.codecs.sharing import check_share

OWN_BITS = 16
"""What `--bits` calls numbers in the cache's own dtype."""

RetainedOption = Annotated[float | None, typer.Option(help="Another retained fraction than the capsule's.")]
BitsOption = Annotated[
    int | None,
    typer.Option(
        help="Bits of a stored number: 8, 4, or 16 for the cache's dtype; by default those of the capsule."
    ),
]

ShareOption = Annotated[
    str | None,
    typer.Option(
        help="block: every block keeps the same number of tokens; prompt: the blocks of a prompt share them "
        "out; by default as the capsule says."
    ),
]


def chosen_capsule(
    source: str | None, model: str, retained: float | None, bits: int | None, share: str | None
) -> KVCapsule:
    """The capsule that a command line names, with the retained fraction, bits and sharing that it names.

    Raises:
        CapsightError: there is none, or it cannot be had so.
    """
    capsule = load_capsule(source, model)
    if retained is not None:
        capsule = capsule.with_retained(retained)
    if share is not None:
        capsule = capsule.with_share(check_share(share))
    return capsule if bits is None else capsule.with_bits(None if bits == OWN_BITS else bits)
