"""Saved capsule caches: one safetensors file, replaced in one step, checked in full when read; no pickle."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedConfig

from capsight.errors import CapsightError, CapsuleFileError, LayoutError, ModelMismatchError, OptionError
from capsight.files import replace_file
from capsight.kvcapsule.cache import CapsuleCache
from capsight.kvcapsule.cache_parts import put_together, take_apart
from capsight.kvcapsule.capsule import KVCapsule
from capsight.kvcapsule.fingerprint import tensors_fingerprint
from capsight.kvcapsule.prompt import Prompt

KIND = "capsight.capsule_cache"
FORMAT_VERSION = 1


class SavedCache(NamedTuple):
    """What a file holds.

    Attributes:
        cache: to be handed to the model that made it.
        prompt: what it has read.
        rope_deltas: int64 `[B, 1]`, what a model with M-RoPE adds to the positions of later tokens, or None.
    """

    cache: CapsuleCache
    prompt: Prompt
    rope_deltas: Tensor | None


def save_cache(path: str | os.PathLike[str], saved: SavedCache, capsule: KVCapsule) -> None:
    """Write a cache to a file; a reader sees the old file or the new one, never a mixture.

    Args:
        path: the file, usually *.safetensors.
        saved: the cache and what was read.
        capsule: the capsule that made the cache.

    Raises:
        CapsuleFileError: the file cannot be written; what was there before is unharmed.
        CapsightError: the cache is empty, holds NaN or infinite numbers, or its rows are not the prompt's.
    """
    header, tensors = take_apart(saved.cache)
    prompt = saved.prompt.repeated(saved.cache.layout.batch_size)
    if prompt is None:
        raise CapsightError(
            "the rows of the cache are not those of its prompt; save it before rows are selected"
        )
    tensors["input_ids"] = prompt.input_ids[:, : saved.cache.get_seq_length()].to(torch.int64)
    if saved.rope_deltas is not None:
        tensors["rope_deltas"] = saved.rope_deltas.to(torch.int64)
    tensors = {name: _own(tensor) for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise CapsightError(
                f"the cache holds NaN or infinite values ({name}); it was not saved, prefill again"
            )
    header |= {
        "format_version": FORMAT_VERSION,
        "pixels": prompt.pixels,
        "model": capsule.info.fingerprint,
        "capsule": capsule_fingerprint(capsule),
        "made_with": _described(capsule),
        "weights": capsule.info.options.get("weights", "solved"),
    }
    text = json.dumps(header, sort_keys=True)
    metadata = {"format": KIND, "header": text, "sha256": tensors_fingerprint(tensors, text)}
    _write(Path(path), tensors, metadata)


def load_cache(
    path: str | os.PathLike[str],
    capsule: KVCapsule,
    config: PreTrainedConfig | None = None,
    devices: Mapping[int, torch.device] | None = None,
) -> SavedCache:
    """Read a cache, to go on with it where it was saved.

    Args:
        path: a file that `save_cache` wrote.
        capsule: the capsule that made the cache.
        config: the model's config; by default the one of the model the capsule was fitted to.
        devices: where each layer goes, by layer index; the CPU by default.

    Raises:
        CapsuleFileError: the file is missing, truncated, changed since it was written, of another kind or
            format version, or holds what does not fit together.
        ModelMismatchError: the cache was made for another model, or with another capsule.
    """
    path = Path(path)
    text, tensors = _read(path)
    try:
        header = json.loads(text)
        if not isinstance(header, dict):
            raise ValueError("it is not an object")
    except (ValueError, RecursionError) as error:
        raise CapsuleFileError(f"{path} has a malformed header ({error}); save the cache again") from error
    _check_origin(path, header, capsule)
    cpu: defaultdict[int, torch.device] = defaultdict(lambda: torch.device("cpu"))
    try:
        if capsule.info.codec == "adaptive":  # with weights as they are in the file; neither is wrong
            weights: Any = header.get("weights")
            capsule = capsule.with_weights(weights)
        ids, deltas = tensors.pop("input_ids", None), tensors.pop("rope_deltas", None)
        cache = put_together(
            header, tensors, capsule, capsule.config if config is None else config, devices or cpu
        )
        if tensors:
            raise CapsuleFileError(f"tensors of no layer: {sorted(tensors)[:3]}; save the cache again")
        return SavedCache(cache, _prompt(ids, header.get("pixels"), cache), _deltas(deltas, cache))
    except (CapsuleFileError, LayoutError, OptionError) as error:
        raise CapsuleFileError(f"{path}: {error}") from error


def capsule_fingerprint(capsule: KVCapsule) -> str:
    """Hash of what a capsule learnt, and of how much it keeps in how many bits."""
    tensors = {f"{i}.{k}": t for i, codec in capsule.codecs.items() for k, t in codec.state_dict().items()}
    info = capsule.info
    kept = [(layer.index, layer.kept) for layer in info.layers]
    return tensors_fingerprint(tensors, [info.codec, info.block_size, info.bits, kept])


def _check_origin(path: Path, header: Mapping[str, Any], capsule: KVCapsule) -> None:
    if header.get("format_version") != FORMAT_VERSION:
        raise CapsuleFileError(
            f"{path} has format version {header.get('format_version')!r}, this capsight reads "
            f"{FORMAT_VERSION}; use the capsight that wrote it, or save the cache again"
        )
    if header.get("model") != capsule.info.fingerprint:
        raise ModelMismatchError(
            f"{path} was made for another model than this capsule; load it with the model and capsule that "
            "made it, or prefill again"
        )
    if header.get("capsule") != capsule_fingerprint(capsule):
        raise ModelMismatchError(
            f"{path} was made with another capsule ({header.get('made_with')}; this one: "
            f"{_described(capsule)}); load it with that one, with_retained and with_bits "
            "included, or prefill again"
        )


def _described(capsule: KVCapsule) -> str:
    return f"{capsule.name}, {capsule.retained:.3g} retained"


def _prompt(ids: Tensor | None, pixels: Any, cache: CapsuleCache) -> Prompt:
    length, rows = cache.get_seq_length(), cache.layout.batch_size
    fits = ids is not None and ids.dtype == torch.int64 and ids.ndim == 2 and len(ids) == rows
    if ids is None or not fits or not 1 <= ids.shape[1] <= length or not isinstance(pixels, str):
        raise CapsuleFileError("the prompt in it is missing or malformed; save the cache again")
    return Prompt(ids, pixels)


def _deltas(deltas: Tensor | None, cache: CapsuleCache) -> Tensor | None:
    if deltas is None:
        return None
    fits = deltas.dtype == torch.int64 and deltas.ndim == 2 and deltas.shape[1] == 1 and len(deltas)
    if not fits or cache.layout.batch_size % len(deltas):
        raise CapsuleFileError("the rope_deltas in it are malformed; save the cache again")
    return deltas


def _own(tensor: Tensor) -> Tensor:
    """The tensor on the CPU, in memory that holds nothing else."""
    tensor = tensor.detach().cpu().contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    try:
        replace_file(path, lambda temporary: save_file(tensors, temporary, metadata))
    except (OSError, safetensors.SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CapsuleFileError(
            f"cannot write {path}: {reason}; free some space or name another place (what was there is "
            "unharmed)"
        ) from error


def _read(path: Path) -> tuple[str, dict[str, Tensor]]:
    """Header and tensors of a file whose checksum is right; the tensors are copies, not the file itself."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != KIND:
                raise CapsuleFileError(f"{path} is not a saved capsule cache")
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError as error:
        raise CapsuleFileError(f"{path} is missing; is this the file of a saved cache?") from error
    except (safetensors.SafetensorError, OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise CapsuleFileError(
            f"{path} cannot be read as a saved cache ({error}); it may be truncated: copy it again, or save "
            "the cache again"
        ) from error
    text = metadata.get("header", "")
    if tensors_fingerprint(tensors, text) != metadata.get("sha256"):
        raise CapsuleFileError(
            f"{path} was changed since it was written: its checksum is wrong; copy it again, or save the "
            "cache again"
        )
    return text, tensors
