"""A folder of safetensors + JSON: written atomically, checked in full when read; no pickle."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load, save
from torch import Tensor

from capsight.errors import CapsuleFileError
from capsight.files import only_writer, read_bytes, read_header, replace_file, write_header
from capsight.hub import HubOptions, folder_of

HEADER_FILE = "capsule.json"
FORMAT_VERSION = 4

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
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with only_writer(folder) as alone:
            replace_file(folder / name, data)
            write_header(
                folder / HEADER_FILE, kind, FORMAT_VERSION, {**header, "tensors": name, "sha256": checksum}
            )
            for stale in folder.iterdir() if alone else ():  # else another writer may be about to name it
                if _TENSORS_FILE.fullmatch(stale.name) and stale.name != name:
                    stale.unlink()
    except OSError as error:
        raise CapsuleFileError(f"cannot write {folder}: {error.strerror or error}") from error


def read_folder(folder: Path, kind: str, what: str = "capsule") -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header and tensors that `write_folder` wrote.

    Args:
        folder: where they lie.
        kind: what the folder must hold.
        what: that is called in errors.

    Raises:
        CapsuleFileError: a file is missing, truncated, changed since it was written, of another kind
            or format version, or holds NaN or infinite numbers.
    """
    header, name, data = _consistent(folder, kind, what)
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


def locate(source: str | os.PathLike[str], hub: HubOptions) -> Path:
    """The folder that `source` names: "reference", "reference-heads" (those shipped), a folder, or a hub id.

    Raises:
        CapsuleFileError: there is no such folder, and the hub has no such repository or cannot be reached.
    """
    shipped = {"reference": "capsule", "reference-heads": "capsule-heads"}
    if source in shipped:
        return Path(str(files("capsight").joinpath("reference", "weights", shipped[str(source)])))
    return folder_of(source, (HEADER_FILE, "capsule-*.safetensors"), "folder", hub)


def _consistent(folder: Path, kind: str, what: str) -> tuple[dict[str, Any], str, bytes]:
    """The header, and the name and content of the tensors file that it names."""
    header = read_header(folder / HEADER_FILE, kind, FORMAT_VERSION, what)
    name, checksum = header.get("tensors"), header.get("sha256")
    if not isinstance(name, str) or not _TENSORS_FILE.fullmatch(name):
        raise CapsuleFileError(
            f"{folder / HEADER_FILE} does not name its tensors file; save the {what} again"
        )
    try:
        data = read_bytes(folder / name, what)
    except CapsuleFileError:
        if read_header(folder / HEADER_FILE, kind, FORMAT_VERSION, what) != header:
            return _consistent(folder, kind, what)  # it was saved again meanwhile
        raise
    if hashlib.sha256(data).hexdigest() != checksum:
        raise CapsuleFileError(
            f"{folder / name} is truncated or was changed: its checksum is not the one in {HEADER_FILE}; "
            "copy or download the folder again"
        )
    return header, name, data
