"""Where a head map's JSON file is, and how it is written and read."""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from capsight.errors import CapsuleFileError
from capsight.files import read_header, write_header

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


def read(source: str | os.PathLike[str]) -> tuple[dict[str, Any], Path]:
    """What `write` wrote, and the file; see `HeadMap.from_pretrained`."""
    path = _locate(source)
    return read_header(path, FORMAT, FORMAT_VERSION, "head map"), path


def _locate(source: str | os.PathLike[str]) -> Path:
    if source == "reference":
        return Path(str(files("capsight").joinpath("reference", "weights", "head_map", FILE_NAME)))
    path = Path(source)
    if path.is_dir():
        return path / FILE_NAME
    if path.exists() or path.suffix == ".json" or not isinstance(source, str):
        return path
    try:
        return Path(hf_hub_download(source, FILE_NAME))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise CapsuleFileError(
            f"there is no head map at {source!r}, and the hub does not give it: {error}"
        ) from error
