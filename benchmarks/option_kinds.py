"""Kinds of options; what is none of a kind is refused before anything is measured."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import typer

N = TypeVar("N", int, float)


def integers(least: int = 1) -> Callable[[str], list[int]]:
    """A parser of comma-separated whole numbers, none below that."""
    return lambda text: _listed(text, int, f"whole numbers from {least} on", lambda x: x >= least)


def fractions(text: str) -> list[float]:
    """Comma-separated numbers above 0, up to 1."""
    return _listed(text, float, "numbers above 0, up to 1", lambda x: 0 < x <= 1)


def one_of(*names: str) -> Callable[[str], str]:
    """A parser of one of these names."""

    def name(text: str) -> str:
        if text not in names:
            raise typer.BadParameter(f"{text!r} has to be one of {', '.join(names)}")
        return text

    return name


def _listed(text: str, kind: Callable[[str], N], wanted: str, fits: Callable[[N], bool]) -> list[N]:
    try:
        found = [kind(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(map(fits, found)):
        raise typer.BadParameter(f"{text!r} has to be {wanted}, with commas between them")
    return found
