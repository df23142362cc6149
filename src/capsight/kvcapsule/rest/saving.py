"""Caches at rest: the latents of each image coded, and of text its token ids, or its numbers as they are.

Text is a few tokens beside hundreds of an image, but its keys and values would take more bytes than all coded
latents. The model gives them again from the ids, in one pass without pixels. Where it cannot (states, sliding
windows, several rows, tokens that no id stands for) they are in the file as they were.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import torch
from safetensors.torch import save

from capsight.errors import CapsightError, CapsuleFileError, OptionError
from capsight.files import replace_file
from capsight.kvcapsule.cache import CapsuleCache
from capsight.kvcapsule.cache_parts import conversation_of, serialize
from capsight.kvcapsule.capsule import KVCapsule
from capsight.kvcapsule.rest.container import write_container
from capsight.kvcapsule.rest.latents import code
from capsight.kvcapsule.rest.parts import (
    can_reread,
    image_sizes,
    joint_codec,
    learnt_fingerprint,
    open_latents,
)

KIND = "cache"
_LATENTS = (".capsule.codes", ".capsule.scales")
_COARSEST, _FINEST, _HALVINGS = 0.05, 1 - 1e-6, 14  # of qualities that are tried for a size


def save_rest(
    path: str | os.PathLike[str],
    cache: CapsuleCache,
    capsule: KVCapsule,
    quality: float | None,
    reread: bool,
    nbytes: int | None = None,
) -> None:
    """Write a cache in the form for rest; a reader sees the old file or the new one, never a mixture.

    Args:
        path: the file.
        cache: the cache, its `conversation` set.
        capsule: the joint capsule that made the cache.
        quality: share of the variance of calibration latents that comes back; None for the best that fits.
        reread: whether the model can give the text again.
        nbytes: bytes that the file may take, instead of `quality`.

    Raises:
        CapsuleFileError: the file cannot be written; what was there before is unharmed.
        CapsightError: the cache is empty, holds no image or infinite numbers, or nobody has said what it
            read.
        OptionError: the capsule is of another codec, the entropy coder is not installed, or so few bytes hold
            nothing.
    """
    at = _written(cache, capsule, reread)
    if quality is not None:
        data = at(quality)
    else:
        assert nbytes is not None
        data = _best(at, nbytes)
    try:
        replace_file(Path(path), data)
    except OSError as error:
        raise CapsuleFileError(
            f"cannot write {path}: {error.strerror or error}; free some space or name another place (what "
            "was there is unharmed)"
        ) from error


def _written(cache: CapsuleCache, capsule: KVCapsule, reread: bool) -> Callable[[float], bytes]:
    """The file's content at any quality."""
    codec, (header, tensors) = joint_codec(capsule), serialize(cache)
    read = conversation_of(cache)
    length = cache.get_seq_length()
    layout, ids = cache.layout.continued(length, length), read.input_ids[:, :length]
    reread = reread and can_reread(layout, ids)
    latents = open_latents(cache, codec).split(image_sizes(layout))
    text = []
    if not reread:
        rest = {k: t.detach().cpu().clone() for k, t in tensors.items() if not k.endswith(_LATENTS)}
        if any(t.is_floating_point() and not torch.isfinite(t).all() for t in rest.values()):
            raise CapsightError("the cache holds NaN or infinite values; it was not saved, prefill again")
        text.append(save({name: t.contiguous() for name, t in rest.items()}))
    header |= {
        "kind": KIND,
        "layout": layout.to_dict() if reread else cache.layout.to_dict(),
        "settled": length if reread else header["settled"],
        "ids": ids.tolist(),
        "prompt": min(read.prompt, length),
        "images": read.images,
        "model": capsule.info.fingerprint,
        "capsule": learnt_fingerprint(capsule),
        "dtype": str(next(iter(cache.capsule_layers.values())).dtype),
        "reread": reread,
        "adapters": cache.adapters,
    }

    def at(quality: float) -> bytes:
        file = BytesIO()
        pieces = [code(image_latents, codec.lost, quality) for image_latents in latents]
        write_container(file, {**header, "quality": quality}, [*pieces, *text])
        return file.getvalue()

    return at


def _best(at: Callable[[float], bytes], nbytes: int) -> bytes:
    """What `at` gives at the best quality that takes no more than `nbytes`; qualities are halved."""
    best = at(_COARSEST)
    if len(best) > nbytes:
        raise OptionError(f"these images take {len(best)} bytes at least, more than the {nbytes} given")
    low, high = _COARSEST, _FINEST
    for _ in range(_HALVINGS):
        quality = 1 - ((1 - low) * (1 - high)) ** 0.5  # what is lost is halved
        try:
            data = at(quality)
        except OptionError:  # integers would be too large
            data = b""
        if data and len(data) <= nbytes:
            low, best = quality, data
        else:
            high = quality
    return best
