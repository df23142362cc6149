"""Caches at rest, as they are read again: see `saving` for what is in them."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load
from torch import Tensor
from transformers import PreTrainedConfig

from capsight.errors import CapsightError, CapsuleFileError, LayoutError, ModelMismatchError
from capsight.kvcapsule.cache import CapsuleCache
from capsight.kvcapsule.cache.conversation import Conversation
from capsight.kvcapsule.cache_parts import deserialize
from capsight.kvcapsule.capsule import KVCapsule
from capsight.kvcapsule.codecs import Payload
from capsight.kvcapsule.rest.container import MAGIC, Container
from capsight.kvcapsule.rest.latents import decode
from capsight.kvcapsule.rest.parts import can_reread, image_sizes, joint_codec, learnt_fingerprint, packed
from capsight.kvcapsule.rest.saving import KIND
from capsight.layout import PromptLayout

Reread = Callable[[PromptLayout, Tensor, Payload], Mapping[int, Tensor]]
"""Gives text's keys and values `[2, E, H, D]` by layer, of layout, ids `[1, S]` and latents."""


@dataclass(frozen=True, slots=True)
class RestFile:
    """What a cache at rest says of itself.

    Attributes:
        quality: share of the variance of calibration latents that comes back.
        images: bytes of each image's latents, in order.
        text: bytes of text's keys and values; 0 where the model gives them again.
        nbytes: bytes of the file.
        layout: of the prompt.
    """

    quality: float
    images: tuple[int, ...]
    text: int
    nbytes: int
    layout: PromptLayout


def is_rest_file(path: str | os.PathLike[str]) -> bool:
    """Whether a file begins as caches at rest do."""
    try:
        with Path(path).open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def load_rest(
    path: str | os.PathLike[str],
    capsule: KVCapsule,
    config: PreTrainedConfig,
    devices: Mapping[int, torch.device],
    dtype: torch.dtype,
    reread: Reread,
) -> CapsuleCache:
    """Read a cache at rest, to go on with it where it was saved.

    Args:
        path: a file that `save_rest` wrote.
        capsule: the capsule that made the cache, at any retained fraction: what the cache will hold.
        config: the model's config.
        devices: where each layer goes, by layer index.
        dtype: of the model.
        reread: gives the keys and values of text.

    Raises:
        CapsuleFileError: the file is missing, truncated, changed since it was written, of another kind or
            format version, or holds what does not fit together.
        ModelMismatchError: the cache was made for another model or dtype, or with another capsule.
        OptionError: the capsule is of another codec, or the entropy coder is not installed.
    """
    codec = joint_codec(capsule)
    try:
        with Path(path).open("rb") as file:
            opened = Container(file, path)
            header = opened.header
            _check_origin(path, header, capsule, dtype)
            layout = PromptLayout.from_dict(header["layout"])
            ids = torch.tensor(header["ids"], dtype=torch.int64)
            sizes = image_sizes(layout)
            latents = [decode(opened.piece(i), n, codec.levels.rank) for i, n in enumerate(sizes)]
            payload = packed(torch.cat(latents), codec)
            tensors = _text(opened, layout, ids, payload, reread, len(sizes), sorted(capsule.codecs))
        first = min(capsule.codecs)
        tensors |= {f"layers.{first}.capsule.{name}": x for name, x in payload.tensors.items()}
        cache = deserialize(header, tensors, capsule, config, devices)
        if tensors:
            raise CapsuleFileError(f"tensors of no layer: {sorted(tensors)[:3]}; save the cache again")
        images, prompt = tuple(tuple(map(str, row)) for row in header["images"]), int(header["prompt"])
        if not (ids.ndim == 2 and len(ids) == len(images) and 1 <= prompt <= ids.shape[1]):
            raise CapsuleFileError("the prompt in it is malformed; save the cache again")
        cache.conversation = Conversation(cache.layout, ids, prompt, images)
        cache.adapters = str(header.get("adapters", ""))
        return cache
    except FileNotFoundError as error:
        raise CapsuleFileError(f"{path} is missing; is this the file of a saved cache?") from error
    except OSError as error:
        raise CapsuleFileError(f"cannot read {path}: {error.strerror or error}") from error
    except (CapsuleFileError, LayoutError) as error:
        named = str(error).startswith(str(path))
        raise CapsuleFileError(str(error) if named else f"{path}: {error}") from error
    except CapsightError:
        raise
    except (KeyError, ValueError, TypeError, OverflowError) as error:
        raise CapsuleFileError(f"{path} is malformed ({error!r}); save the cache again") from error


def read_rest_file(path: str | os.PathLike[str]) -> RestFile:
    """What a file says of itself, without reading its images.

    Raises:
        CapsuleFileError: it is missing, truncated, or no cache at rest.
    """
    try:
        with Path(path).open("rb") as file:
            opened = Container(file, path)
            layout = PromptLayout.from_dict(opened.header["layout"])
            count = len(image_sizes(layout))
            quality, sizes = float(opened.header["quality"]), tuple(opened.sizes)
            return RestFile(quality, sizes[:count], sum(sizes[count:]), opened.nbytes, layout)
    except OSError as error:
        raise CapsuleFileError(f"cannot read {path}: {error.strerror or error}") from error
    except (KeyError, TypeError, ValueError, LayoutError) as error:
        raise CapsuleFileError(f"{path} is malformed ({error!r}); save the cache again") from error


def _text(
    opened: Container,
    layout: PromptLayout,
    ids: Tensor,
    payload: Payload,
    reread: Reread,
    at: int,
    layers: list[int],
) -> dict[str, Tensor]:
    """Tensors of text as `deserialize` takes them."""
    if opened.header["reread"] is not True:
        return load(opened.piece(at))
    if not can_reread(layout, ids):
        raise CapsuleFileError("its layout is not that of its tokens; save the cache again")
    tensors: dict[str, Tensor] = {}
    for index, exact in zip(layers, reread(layout, ids, payload).values(), strict=True):
        tail = exact.new_empty(2, 1, 0, *exact.shape[2:])
        tensors |= {f"layers.{index}.exact": exact.cpu().contiguous(), f"layers.{index}.tail": tail.cpu()}
    return tensors


def _check_origin(
    path: str | os.PathLike[str], header: Mapping[str, Any], capsule: KVCapsule, dtype: torch.dtype
) -> None:
    if header.get("kind") != KIND:
        raise CapsuleFileError("it does not hold a cache")
    if header.get("model") != capsule.info.fingerprint:
        raise ModelMismatchError(
            f"{path} was made for another model than this capsule; load it with the model and capsule that "
            "made it, or prefill again"
        )
    if header.get("capsule") != learnt_fingerprint(capsule):
        raise ModelMismatchError(f"{path} was made with another capsule; load it with that one")
    if header.get("dtype") != str(dtype):
        raise ModelMismatchError(
            f"{path} was made in {header.get('dtype')}, the model runs in {dtype}; load the model so"
        )
