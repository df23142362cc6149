"""A folder of safetensors + JSON: written atomically, checked in full when read; no pickle."""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import safetensors
import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors.torch import load, save
from torch import Tensor

from capsight.errors import CapsuleFileError

HEADER_FILE = "capsule.json"
FORMAT_VERSION = 3

_TENSORS_FILE = re.compile(r"capsule-[0-9a-f]{16}\.safetensors")


def write_folder(folder: Path, kind: str, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write tensors and header; a reader sees the old content or the new, never a mixture.

    The tensors go to a file named after their hash; replacing the JSON file that names it is the
    one step that makes them the folder's content.

    Args:
        folder: made if it does not exist.
        kind: what the folder holds; `read_folder` asks for it.
        header: JSON-ready values.
        tensors: named tensors, on any device.

    Raises:
        CapsuleFileError: the folder cannot be written (what it held before is unharmed).
    """
    data = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
    checksum = hashlib.sha256(data).hexdigest()
    name = f"capsule-{checksum[:16]}.safetensors"
    full = {"format": kind, "format_version": FORMAT_VERSION, "tensors": name, "sha256": checksum, **header}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _replace(folder / name, data)
        _replace(folder / HEADER_FILE, (json.dumps(full, indent=2, sort_keys=True) + "\n").encode())
        for stale in folder.iterdir():
            if _TENSORS_FILE.fullmatch(stale.name) and stale.name != name:
                stale.unlink()
    except OSError as error:
        raise CapsuleFileError(f"cannot write {folder}: {error.strerror or error}") from error


def read_folder(folder: Path, kind: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header and tensors that `write_folder` wrote.

    Args:
        folder: where they lie.
        kind: what the folder must hold.

    Raises:
        CapsuleFileError: a file is missing, truncated, changed since it was written, of another kind
            or format version, or holds NaN or infinite numbers.
    """
    header = _read_header(folder / HEADER_FILE, kind)
    name, checksum = header.get("tensors"), header.get("sha256")
    if not isinstance(name, str) or not _TENSORS_FILE.fullmatch(name):
        raise CapsuleFileError(
            f"{folder / HEADER_FILE} does not name its tensors file; save the capsule again"
        )
    data = _read(folder / name)
    if hashlib.sha256(data).hexdigest() != checksum:
        raise CapsuleFileError(
            f"{folder / name} is truncated or was changed: its checksum is not the one in {HEADER_FILE}; "
            "copy or download the folder again"
        )
    try:
        tensors = load(data)
    except (safetensors.SafetensorError, ValueError, KeyError) as error:
        raise CapsuleFileError(f"{folder / name} is not a safetensors file: {error}") from error
    for tensor_name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise CapsuleFileError(
                f"tensor {tensor_name} in {folder / name} holds NaN or infinite values; fit again"
            )
    return header, tensors


def locate(source: str | os.PathLike[str]) -> Path:
    """The folder that `source` names: "reference" (the shipped one), a folder, or a hub repository id.

    Raises:
        CapsuleFileError: there is no such folder, and the hub has no such repository or cannot be reached.
    """
    if source == "reference":
        return Path(str(files("capsight").joinpath("reference", "weights", "capsule")))
    path = Path(source)
    if path.exists() or not isinstance(source, str):
        return path
    try:
        return Path(snapshot_download(source, allow_patterns=[HEADER_FILE, "capsule-*.safetensors"]))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise CapsuleFileError(
            f"there is no folder {source!r}, and the hub does not give it: {error}"
        ) from error


def _read_header(path: Path, kind: str) -> dict[str, Any]:
    try:
        header = json.loads(_read(path))
    except ValueError as error:  # also what is not UTF-8
        raise CapsuleFileError(f"{path} is not JSON ({error}); save the capsule again") from error
    if not isinstance(header, dict) or header.get("format") != kind:
        raise CapsuleFileError(f"{path} does not describe a {kind}")
    version = header.get("format_version")
    if version != FORMAT_VERSION or isinstance(version, (bool, float)):
        raise CapsuleFileError(
            f"{path} has format version {version!r}, this capsight reads {FORMAT_VERSION}; "
            "use the capsight that wrote it, or fit again"
        )
    return header


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise CapsuleFileError(f"{path} is missing; is this the folder of a saved capsule?") from error
    except OSError as error:
        raise CapsuleFileError(f"cannot read {path}: {error.strerror or error}") from error


def _replace(path: Path, data: bytes) -> None:
    """Put `data` at `path` in one step: a temporary file beside it, flushed to disk, then renamed."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
