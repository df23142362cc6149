"""The ways in which attention gets at capsules."""

from __future__ import annotations

from typing import Literal

from capsight.errors import OptionError

Decode = Literal["materialise", "latent"]
DECODES: tuple[Decode, ...] = ("materialise", "latent")
"""How attention gets at capsules."""


def check_decode(name: str) -> Decode:
    """The way to decode of that name.

    Raises:
        OptionError: there is none.
    """
    for known in DECODES:
        if name == known:
            return known
    raise OptionError(f"decode must be one of {list(DECODES)}, not {name!r}")
