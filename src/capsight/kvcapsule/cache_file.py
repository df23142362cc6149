"""Saved capsule caches: one safetensors file, replaced in one step, checked in full when read; no pickle."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedConfig

from capsight.errors import CapsightError, CapsuleFileError, LayoutError, ModelMismatchError, OptionError
from capsight.files import replace_file
from capsight.kvcapsule.cache import CapsuleCache
from capsight.kvcapsule.cache.conversation import Conversation
from capsight.kvcapsule.cache_parts import conversation_of, deserialize, serialize
from capsight.kvcapsule.capsule import KVCapsule
from capsight.kvcapsule.fingerprint import tensors_fingerprint

KIND = "capsight.capsule_cache"
FORMAT_VERSION = 2


def save_cache(path: str | os.PathLike[str], cache: CapsuleCache, capsule: KVCapsule) -> None:
    """Write a cache to a file; a reader sees the old file or the new one, never a mixture.

    Args:
        path: the file, usually *.safetensors.
        cache: the cache, its `conversation` set.
        capsule: the capsule that made the cache.

    Raises:
        CapsuleFileError: the file cannot be written; what was there before is unharmed.
        CapsightError: the cache is empty, holds NaN or infinite numbers, or nobody has said what it read.
    """
    header, tensors = serialize(cache)
    read = conversation_of(cache)
    tensors["input_ids"] = read.input_ids[:, : cache.get_seq_length()]
    tensors = {name: _own(tensor) for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise CapsightError(
                f"the cache holds NaN or infinite values ({name}); it was not saved, prefill again"
            )
    header |= {
        "format_version": FORMAT_VERSION,
        "prompt": min(read.prompt, cache.get_seq_length()),
        "images": read.images,
        "model": capsule.info.fingerprint,
        "capsule": capsule_fingerprint(capsule),
        "made_with": _described(capsule),
        "weights": capsule.info.options.get("weights", "solved"),
        "adapters": cache.adapters,
    }
    text = json.dumps(header, sort_keys=True)
    metadata = {"format": KIND, "header": text, "sha256": tensors_fingerprint(tensors, text)}
    _write(Path(path), tensors, metadata)


def load_cache(
    path: str | os.PathLike[str],
    capsule: KVCapsule,
    config: PreTrainedConfig | None = None,
    devices: Mapping[int, torch.device] | None = None,
) -> CapsuleCache:
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
    header, tensors = read_saved(path)
    _check_origin(path, header, capsule)
    cpu: defaultdict[int, torch.device] = defaultdict(lambda: torch.device("cpu"))
    try:
        if capsule.info.codec == "adaptive":  # with weights as they are in the file; neither is wrong
            weights: Any = header.get("weights")
            capsule = capsule.with_weights(weights)
        ids = tensors.pop("input_ids", None)
        cache = deserialize(
            header, tensors, capsule, capsule.config if config is None else config, devices or cpu
        )
        if tensors:
            raise CapsuleFileError(f"tensors of no layer: {sorted(tensors)[:3]}; save the cache again")
        cache.conversation = _conversation(ids, header, cache)
        cache.adapters = str(header.get("adapters", ""))
        return cache
    except (CapsuleFileError, LayoutError, OptionError) as error:
        raise CapsuleFileError(f"{path}: {error}") from error


def read_saved(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header and tensors of a file whose checksum is right; the tensors are copies, not the file itself.

    Raises:
        CapsuleFileError: it is missing, truncated, changed since it was written, or of another kind.
    """
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
    try:
        header = json.loads(text)
        if not isinstance(header, dict):
            raise ValueError("it is not an object")
    except (ValueError, RecursionError) as error:
        raise CapsuleFileError(f"{path} has a malformed header ({error}); save the cache again") from error
    return header, tensors


def capsule_fingerprint(capsule: KVCapsule) -> str:
    """Hash of what a capsule learnt, and of how much it keeps in how many bits."""
    tensors = {f"{i}.{k}": t for i, codec in capsule.codecs.items() for k, t in codec.state_dict().items()}
    info = capsule.info
    counts = [(layer.index, layer.kept) for layer in info.layers]
    first = next(iter(capsule.codecs.values()))
    stored = [first.coding, first.constants]
    return tensors_fingerprint(tensors, [info.codec, info.block_size, info.bits, info.share, counts, stored])


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


def _conversation(ids: Tensor | None, header: Mapping[str, Any], cache: CapsuleCache) -> Conversation:
    length, rows = cache.get_seq_length(), cache.layout.batch_size
    prompt, images = header.get("prompt"), header.get("images")
    fits = ids is not None and ids.dtype == torch.int64 and ids.ndim == 2 and len(ids) == rows
    named = isinstance(images, list) and len(images) == rows and all(map(_strings, images))
    if ids is None or not fits or not named or not isinstance(prompt, int):
        raise CapsuleFileError("the prompt in it is missing or malformed; save the cache again")
    if not 1 <= prompt <= ids.shape[1] <= length:
        raise CapsuleFileError("the prompt in it is not as long as it says; save the cache again")
    return Conversation(cache.layout, ids, prompt, tuple(map(tuple, images or ())))


def _strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(entry, str) for entry in value)


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
