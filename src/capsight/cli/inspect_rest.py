"""What `capsight inspect` says of saved caches, and of images at rest: bytes of each, and their quality."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from capsight.cli.output import human_bytes
from capsight.errors import CapsuleFileError, LayoutError
from capsight.kvcapsule.cache_file import read_saved
from capsight.kvcapsule.rest import CapsuleStore, read_rest_file
from capsight.layout import PromptLayout


def is_store(path: str) -> bool:
    """Whether a folder holds images of a store."""
    return Path(path).is_dir() and bool(CapsuleStore(path).files())


def file_facts(path: str) -> dict[str, Any]:
    """Of a cache at rest.

    Raises:
        CapsuleFileError: it is truncated or was changed.
    """
    file = read_rest_file(path)
    return {
        "quality": file.quality,
        "file": human_bytes(file.nbytes),
        "tokens": file.layout.length,
        "vision tokens": file.layout.vision_tokens,
        "images": len(file.images),
        "bytes of each image": list(file.images),
        "text": "read anew from its ids" if not file.text else f"as it was, {human_bytes(file.text)}",
    }


def saved_facts(path: str) -> dict[str, Any]:
    """Of a cache that was saved as it is.

    Raises:
        CapsuleFileError: it is truncated or was changed.
    """
    header, tensors = read_saved(Path(path))
    try:
        layout = PromptLayout.from_dict(header["layout"])
        capsule, model = str(header["made_with"]), str(header["model"])
    except (KeyError, TypeError, ValueError, LayoutError) as error:
        raise CapsuleFileError(f"{path} has a malformed header ({error!r}); save the cache again") from error
    return {
        "capsule": capsule,
        "file": human_bytes(Path(path).stat().st_size),
        "rows": layout.batch_size,
        "tokens": tensors["input_ids"].shape[1] if "input_ids" in tensors else layout.length,
        "vision tokens": layout.vision_tokens,
        "images": layout.num_images,
        "model": model,
    }


def store_facts(path: str) -> dict[str, Any]:
    """Of a store.

    Raises:
        CapsuleFileError: an image in it is truncated or was changed.
    """
    store = CapsuleStore(path)
    about = [store.about(file) for file in store.files()]
    sizes = [one.nbytes for one in about]
    qualities = Counter(one.quality for one in about)
    return {
        "images": len(about),
        "bytes": human_bytes(sum(sizes)),
        "bytes of an image": f"{sum(sizes) / len(sizes):.0f} on average, {min(sizes)} to {max(sizes)}",
        "vision tokens": sum(one.tokens for one in about),
        "quality": ", ".join(f"{n} of {quality:g}" for quality, n in sorted(qualities.items())),
        "models and capsules": len({Path(one.path).parent for one in about}),
    }
