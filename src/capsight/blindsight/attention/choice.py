"""The measured table of which implementation is fastest: `choice.json`, read once."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from typing import Any, Literal

import torch

from capsight.blindsight.attention.work import Work
from capsight.blindsight.categories import Category
from capsight.blindsight.rule import CAUSAL
from capsight.execution import has_amx

Kind = Literal["dense", "own_image", "sink"]
"""Plainly causal Dense heads; heads that see their own image, and Dense ones under a mask; Sink heads."""

Steps = Sequence[tuple[int, str]]
"""(keys, implementation), ascending: from that number of keys on it is the fastest."""

UNMEASURED: Mapping[Kind, Steps] = {
    "dense": ((0, "segments"),),
    "own_image": ((0, "segments"), (4096, "flex")),
    "sink": ((0, "segments"), (4096, "flex")),
}
"""For devices and dtypes that are not in the table."""


def kind_of(work: Work) -> Kind:
    """Which column of the table some work belongs to."""
    if work.category is Category.SINK:
        return "sink"
    whole = work.chunk.first_key == work.chunk.first_query
    return "dense" if work.category is Category.DENSE and work.rule == CAUSAL and whole else "own_image"


def device_name(device: torch.device) -> str:
    """The table's name for a device: its type, and for CPUs whether they have AMX (fast bfloat16)."""
    if device.type == "cpu" and has_amx():
        return "cpu amx"
    return device.type


def fastest(device: torch.device, dtype: torch.dtype, kind: Kind, keys: int) -> str:
    """The name of the implementation that was fastest for this many keys.

    Args:
        device: of the tensors.
        dtype: of the tensors.
        kind: of the heads.
        keys: how many there are (T).
    """
    kinds = _table().get(device_name(device), {}).get(str(dtype).removeprefix("torch."), UNMEASURED)
    steps = kinds.get(kind, UNMEASURED[kind])
    return [name for first, name in steps if first <= keys][-1]


def mask_wins(device: torch.device, dtype: torch.dtype, tokens: int) -> bool:
    """Whether sparse attention may be faster than dense at so many tokens; yes where that was not measured.

    Args:
        device: of the tensors.
        dtype: of the tensors.
        tokens: of a whole prefill.
    """
    measured = _measured()["mask_from"].get(device_name(device), {})
    return tokens >= int(measured.get(str(dtype).removeprefix("torch."), 0))


def _table() -> dict[str, dict[str, Mapping[Kind, Steps]]]:
    return dict(_measured()["table"])


@cache
def _measured() -> dict[str, Any]:
    text = files("capsight.blindsight.attention").joinpath("choice.json").read_text(encoding="utf-8")
    return dict(json.loads(text))
