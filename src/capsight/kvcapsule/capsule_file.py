"""Capsule folders: the codecs of a capsule and what is known of them, written, read, and checked."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from capsight.errors import CapsuleFileError, OptionError
from capsight.hub import HubOptions, check_names
from capsight.kvcapsule.codecs import ALL_CODECS, JointCodec, LayerCodec
from capsight.kvcapsule.info import CapsuleInfo, LayerInfo
from capsight.kvcapsule.store import locate, read_folder, write_folder

KIND = "capsight.kvcapsule"


@dataclass(frozen=True, slots=True)
class Origin:
    """The file that a capsule was read from; what its fraction has no use for stayed there.

    Attributes:
        folder: where it lies.
        sha256: of its tensors.
    """

    folder: Path
    sha256: str


def write_capsule(
    folder: str | os.PathLike[str], codecs: Mapping[int, LayerCodec], info: CapsuleInfo
) -> None:
    """Write a capsule to a folder (safetensors + JSON), atomically.

    Raises:
        CapsuleFileError: the folder cannot be written.
    """
    shared = ALL_CODECS[info.codec].shared
    tensors = {
        f"layers.{index}.{name}": tensor
        for index, codec in codecs.items()
        for name, tensor in codec.learnt().items()
        if name not in shared or index == min(codecs)
    }
    constants = dict(ALL_CODECS[info.codec].constants)
    write_folder(Path(folder), KIND, info.to_header() | {"constants": constants}, tensors)


def read_capsule(
    source: str | os.PathLike[str], hub: HubOptions | None = None
) -> tuple[dict[int, LayerCodec], CapsuleInfo, Origin | None]:
    """Codecs by layer index, with no more than their fraction needs; what is known; where the rest is.

    Args:
        source: "reference" for the one shipped with capsight, a folder, or a hub repository id.
        hub: where on the hub.

    Raises:
        CapsuleFileError: it is missing, truncated, changed, or of a format this capsight does not read.
    """
    check_names(hub or {})
    folder = locate(source, hub or {})
    header, tensors = read_folder(folder, KIND)
    codecs, info = _codecs(folder, header, tensors, lean=True)
    return codecs, info, None if info.share is None else Origin(folder, header["sha256"])


def read_again(origin: Origin) -> dict[int, LayerCodec]:
    """Codecs with all that they learnt.

    Raises:
        CapsuleFileError: the file is missing, or is another one by now.
    """
    header, tensors = read_folder(origin.folder, KIND)
    if header["sha256"] != origin.sha256:
        raise CapsuleFileError(
            f"{origin.folder} holds another capsule than the one that was loaded; load it again"
        )
    return _codecs(origin.folder, header, tensors, lean=False)[0]


def _codecs(
    folder: Path, header: Mapping[str, Any], tensors: dict[str, Tensor], lean: bool
) -> tuple[dict[int, LayerCodec], CapsuleInfo]:
    info = CapsuleInfo.from_header(header)
    if info.codec not in ALL_CODECS:
        raise CapsuleFileError(
            f"{folder} uses the codec {info.codec!r}, this capsight knows {sorted(ALL_CODECS)}"
        )
    ours = dict(ALL_CODECS[info.codec].constants)
    named = header.get("constants", ours)
    if not isinstance(named, dict) or ours | named != ours:
        raise CapsuleFileError(
            f"{folder} was fitted where the {info.codec} codec had the constants {header['constants']}, here "
            f"it has {ours}; use the capsight that wrote it, or fit again"
        )
    codecs: dict[int, LayerCodec] = {}
    shared: dict[str, Tensor] = {}
    for layer in info.layers:
        prefix = f"layers.{layer.index}."
        names = [name for name in tensors if name.startswith(prefix)]
        try:
            layer_tensors = {name.removeprefix(prefix): tensors.pop(name) for name in names}
            shared |= {name: x for name, x in layer_tensors.items() if name in ALL_CODECS[info.codec].shared}
            codecs[layer.index] = make_codec(shared | layer_tensors, info, layer, lean)
        except OptionError as error:
            raise CapsuleFileError(
                f"{folder}, layer {layer.index}: {error}; fit the capsule again"
            ) from error
    if tensors:
        raise CapsuleFileError(f"{folder} holds tensors of layers it does not list: {sorted(tensors)[:3]}")
    return codecs, info


def make_codec(
    tensors: Mapping[str, Tensor], info: CapsuleInfo, layer: LayerInfo, lean: bool = False
) -> LayerCodec:
    """The codec of one layer, whose `learnt()` gave `tensors`; `lean` as in `JointCodec`.

    Raises:
        OptionError: they are not those of such a codec.
    """
    shape = (layer.heads, info.block_size, layer.head_dim)
    codec = ALL_CODECS[info.codec].from_tensors(tensors, shape, layer.kept)
    if info.share is not None and isinstance(codec, JointCodec):
        return codec.at(info.share, lean)
    if "weights" in info.options:
        return codec.with_weights(info.options["weights"])
    return codec
