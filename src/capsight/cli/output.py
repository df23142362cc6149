"""Output that all commands share: the console, JSON files, byte counts, the machine line."""

from __future__ import annotations

import json
import os
import platform
import re
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console

from capsight.cli.target import STDOUT, write
from capsight.errors import OptionError
from capsight.evaluation.cache_bytes import CacheBytes
from capsight.execution import processor

_UNITS = {
    "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40,
}  # fmt: skip


def console(json: Path | None = None, stderr: bool = False) -> Console:
    """Where commands print; names and answers are printed as they are, whatever brackets they hold.

    Args:
        json: where the command writes its figures; where that is standard output, all else goes to the
            standard error.
        stderr: print there anyway.
    """
    return Console(stderr=stderr or json == STDOUT, markup=False, emoji=False, highlight=False)


def note(text: str) -> None:
    """A dim line on the standard error."""
    console(stderr=True).print(text, style="dim", soft_wrap=True)


def write_json(path: Path | None, values: dict[str, Any]) -> None:
    """Write `values` with the machine and versions beside them; nothing when `path` is None.

    Raises:
        OptionError: the file cannot be written.
    """
    if path is not None:
        text = json.dumps(values | {"machine": machine()}, indent=2) + "\n"
        write(path, text.encode(errors="backslashreplace"))


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    from capsight import __version__

    return {
        "cpu": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "capsight": __version__,
    }


def human_bytes(count: float) -> str:
    """Bytes as B, KB, MB or GB (powers of 1000)."""
    for unit in ("B", "KB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def cache_bytes(nbytes: CacheBytes) -> str:
    """What a cache takes beside a full one, in words."""
    states = f", states {human_bytes(nbytes.states)}" if nbytes.states else ""
    return f"KV cache {human_bytes(nbytes.kv)}, full {human_bytes(nbytes.kv_full)}{states}"


def parse_bytes(text: str) -> int:
    """Bytes of "80GB" (powers of 1000) or "80GiB" (of 1024).

    Raises:
        OptionError: it is neither.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]+)\s*", text, re.IGNORECASE)
    if match is None or match[2].upper() not in _UNITS:
        raise OptionError(f"{text!r} is no amount of memory; give one such as 80GB or 80GiB")
    return round(float(match[1]) * _UNITS[match[2].upper()])
