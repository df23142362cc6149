"""Where a head map's JSON file is, and how it is written and read."""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from capsight.errors import CapsuleFileError
from capsight.files import read_header, write_header
from capsight.hub import HubOptions, check_names, folder_of

FILE_NAME = "head_map.json"
FORMAT, FORMAT_VERSION = "capsight-head-map", 2


def write(values: Mapping[str, Any], folder: Path) -> Path:
    """See `HeadMap.save_pretrained`."""
    path = folder / FILE_NAME
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_header(path, FORMAT, FORMAT_VERSION, values)
    except OSError as error:
        raise CapsuleFileError(f"cannot write {path}: {error.strerror or error}") from error
    return path


def read(source: str | os.PathLike[str], hub: HubOptions) -> tuple[dict[str, Any], Path]:
    """What `write` wrote, and the file; see `HeadMap.from_pretrained`."""
    check_names(hub)
    path = _locate(source, hub)
    return read_header(path, FORMAT, FORMAT_VERSION, "head map"), path


def _locate(source: str | os.PathLike[str], hub: HubOptions) -> Path:
    if source == "reference":
        return Path(str(files("capsight").joinpath("reference", "weights", "head_map", FILE_NAME)))
    path = Path(source)
    if path.is_file() or path.suffix == ".json":
        return path
    return folder_of(source, (FILE_NAME,), "head map at", hub) / FILE_NAME
