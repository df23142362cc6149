"""What an exported checkpoint is: a model's folder that says which capsules and head map it is served with.

`config.json` holds all that each process of a serving engine has to know; `capsight.json` has sizes and
SHA-256 of the files.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from capsight.errors import CapsuleFileError, UnsupportedModelError
from capsight.files import checked, read_bytes, read_header
from capsight.hub import folder_of

MANIFEST, KIND, VERSION = "capsight.json", "capsight.checkpoint", 1
KEY = "capsight"
PREFIX = "Capsight"
ARCHITECTURES = {
    "qwen2_vl": "Qwen2VLForConditionalGeneration",
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
}
"""Model type -> vLLM's class, for what the plugin carries: images that are one run between delimiters."""

SPANS = {"is_mm_prefix_lm": True, "rswa_window": 1 << 30}
"""Entries of a config that have vLLM hand image spans and prompt lengths to its attention backend.

They also announce two-way attention within images, which only capsight's backend knows not to do; so the
architecture carries a name that vLLM without the plugin refuses.
"""


@dataclass(frozen=True, slots=True)
class Served:
    """The entry `capsight` of an exported `config.json`.

    Attributes:
        capsule: folder inside the checkpoint of the capsule whose latents stay in the engine's memory; None:
            it keeps none.
        head_map: folder of the head map; None: prefill is dense.
        retained: with a capsule, part of the bytes that stay; None: as the capsule has it. Without one, part
            of an image's tokens that stays, whole; None: the cache is not compressed.
        version: of this entry.
    """

    capsule: str | None
    head_map: str | None
    retained: Annotated[float, Field(gt=0, le=1)] | None
    version: int = VERSION

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return asdict(self)


def served(folder: Path, whole: bool = False) -> Served:
    """What an exported checkpoint is served with, its files checked.

    Args:
        folder: that `export_checkpoint` wrote.
        whole: read weights again, too; else their size tells.

    Raises:
        CapsuleFileError: it is no such folder, or a file is missing or was changed since.
        UnsupportedModelError: another version of capsight wrote it.
    """
    for name, known in _listed(folder).items():
        _check(folder / name, known, whole or not name.endswith(".safetensors"))
    entry = json.loads(read_bytes(folder / "config.json", "checkpoint")).get(KEY)
    served = checked(Served, json.dumps(entry), folder / "config.json", "export the checkpoint again")
    if served.version != VERSION:
        raise UnsupportedModelError(f"{folder} is of version {served.version}; this capsight reads {VERSION}")
    return served


def carried(model_config: Any, entry: Served) -> str:
    """The folder of an exported checkpoint, whose capsule and head map are those that it was exported with.

    Args:
        model_config: vLLM's, of which `model` is the folder, or a repository of the Hugging Face hub, and
            `revision` the repository's.
        entry: what is served, which an engine may have been told otherwise than the checkpoint says.

    Raises:
        CapsuleFileError: it is no such folder, was exported without them, or they were changed since.
    """
    return _carried(model_config.model, model_config.revision, entry)


@lru_cache(maxsize=8)
def _carried(source: str, revision: str | None, entry: Served) -> str:
    parts = [part for part in (entry.capsule, entry.head_map) if part is not None]
    if not parts:
        return source
    wanted = [MANIFEST, *(f"{part}/*" for part in parts)]
    folder = folder_of(source, wanted, "exported checkpoint", {"revision": revision})
    listed = _listed(folder)
    for part in parts:
        files = [name for name in listed if name.startswith(f"{part}/")]
        if not files:
            raise CapsuleFileError(f"{folder} was exported without {part!r}; export it again with that")
        for name in files:
            _check(folder / name, listed[name], True)
    return str(folder)


def _listed(folder: Path) -> dict[str, Any]:
    """Size and SHA-256 of each file."""
    if not (folder / MANIFEST).is_file():
        raise CapsuleFileError(
            f"{folder} is no exported checkpoint (it has no {MANIFEST}); make one with `capsight export`"
        )
    files: dict[str, Any] = read_header(folder / MANIFEST, KIND, VERSION, "checkpoint")["files"]
    return files


def _check(path: Path, known: Mapping[str, Any], whole: bool) -> None:
    if not path.is_file():
        raise CapsuleFileError(f"{path} is missing; export the checkpoint again")
    same = path.stat().st_size == known["size"]
    if same and whole:
        with path.open("rb") as file:
            same = hashlib.file_digest(file, "sha256").hexdigest() == known["sha256"]
    if not same:
        raise CapsuleFileError(f"{path} was changed since it was exported; export the checkpoint again")
