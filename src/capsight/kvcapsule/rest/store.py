"""`CapsuleStore`: a folder (or any place fsspec knows) of images that models have read, at rest.

One file an image. Its name is a hash of the image's pixels and one of all that stood before it; the folder's
one of the model, the capsule and the dtype. Files are replaced in one step and check themselves, so any
number of processes may share a store.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import fsspec
import torch
from fsspec.implementations.local import LocalFileSystem
from torch import Tensor

from capsight.errors import CapsuleFileError, CapsuleStoreWarning, OptionError
from capsight.files import only_writer, replace_file
from capsight.kvcapsule.capsule import KVCapsule
from capsight.kvcapsule.rest.container import Container, write_container
from capsight.kvcapsule.rest.latents import DEFAULT_QUALITY, check_quality, code, decode, step_of
from capsight.kvcapsule.rest.parts import joint_codec, learnt_fingerprint

Reuse = Literal["prefix", "anywhere"]
_KIND, _SUFFIX, _ALONE = "image", ".capsule", "-first"


@dataclass(frozen=True, slots=True)
class ImageKey:
    """What an image is found by.

    Attributes:
        image: hash of its pixels and of how the processor cut them.
        before: hash of all tokens and images before it.
        first: whether no other image stood before it.
    """

    image: str
    before: str
    first: bool


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file of a store.

    Attributes:
        path: as its file system names it.
        nbytes: its length.
        used: when it was last read or written, in seconds; written only, where files are not local.
    """

    path: str
    nbytes: int
    used: float


@dataclass(frozen=True, slots=True)
class StoredImage:
    """What a file of a store says of its image.

    Attributes:
        path: of the file.
        nbytes: its length.
        tokens: vision tokens.
        quality: share of the variance of calibration latents that comes back.
    """

    path: str
    nbytes: int
    tokens: int
    quality: float


class CapsuleStore:
    """Images at rest, found by their pixels; hand it to `enable(model, capsule=..., store=...)`.

    Attributes:
        url: where it lies.
        quality: share of the variance of latents that comes back of what is put in.
        max_bytes: size beyond which the images that were not used for longest go; None for no limit.
        reuse: "prefix": an image is taken where all before it, text and images, is what it was read after;
            "anywhere": every image is read by itself, once, and taken wherever it stands. What it had seen of
            other images is then missing: see docs/at-rest.md for the price.
    """

    def __init__(
        self,
        url: str | os.PathLike[str],
        *,
        quality: float = DEFAULT_QUALITY,
        max_bytes: int | None = None,
        reuse: Reuse = "prefix",
    ) -> None:
        """Name a store; it is made when something is put into it.

        Raises:
            OptionError: an option is out of range, or fsspec does not know such a place.
        """
        if reuse not in ("prefix", "anywhere"):
            raise OptionError(f"reuse is 'prefix' or 'anywhere', not {reuse!r}")
        if max_bytes is not None and (isinstance(max_bytes, bool) or max_bytes < 1):
            raise OptionError(f"max_bytes is a positive number of bytes, not {max_bytes!r}")
        try:
            self._fs, self._root = fsspec.core.url_to_fs(os.fspath(url))
        except (ValueError, ImportError) as error:
            raise OptionError(f"there is no store at {os.fspath(url)!r}: {error}") from error
        self.url, self.quality, self.max_bytes = os.fspath(url), check_quality(quality), max_bytes
        self.reuse: Reuse = reuse
        self._local = isinstance(self._fs, LocalFileSystem)

    def get(self, key: ImageKey, capsule: KVCapsule, dtype: torch.dtype) -> Tensor | None:
        """Latents float32 `[T, R]` of an image; None where the store does not have it.

        A file that was damaged is removed, with a warning, and counts as missing.

        Raises:
            OptionError: the capsule is not of the joint codec, or the entropy coder is not installed.
        """
        rank = joint_codec(capsule).levels.rank
        for path in self._candidates(key, self._folder(capsule, dtype)):
            try:
                data = self._fs.cat_file(path)
            except FileNotFoundError:  # another process has removed it
                continue
            except OSError as error:
                self._warn(f"cannot read {path} ({error.strerror or error})")
                continue
            try:
                opened = Container(BytesIO(data), path)
                if opened.header.get("kind") != _KIND or opened.header.get("image") != key.image:
                    raise CapsuleFileError(f"{path} holds something else than its name says")
                latents = decode(opened.piece(0), int(opened.header["tokens"]), rank)
            except (CapsuleFileError, KeyError, TypeError, ValueError) as error:
                self._warn(f"{error}; it is removed")
                self._remove(path)
                continue
            if self._local:
                with suppress(OSError):  # read-only, or removed meanwhile: it was read all the same
                    os.utime(path)
            return latents
        return None

    def put(self, key: ImageKey, latents: Tensor, capsule: KVCapsule, dtype: torch.dtype) -> int:
        """Store the latents float32 `[T, R]` of an image, then remove what is too much.

        Returns:
            Bytes written.

        Raises:
            CapsuleFileError: the place cannot be written; what it held is unharmed.
            OptionError: the capsule is not of the joint codec, or the entropy coder is not installed.
        """
        piece = code(latents, step_of(joint_codec(capsule).lost, self.quality))
        header = {"kind": _KIND, "image": key.image, "tokens": len(latents), "quality": self.quality}
        file = BytesIO()
        write_container(file, header, [piece])
        folder = self._folder(capsule, dtype)
        path = f"{folder}/{_name(key)}"
        try:
            if self._local:
                Path(folder).mkdir(parents=True, exist_ok=True)
                replace_file(Path(path), file.getvalue())
            else:
                self._fs.makedirs(folder, exist_ok=True)
                self._fs.pipe_file(path, file.getvalue())
        except OSError as error:
            raise CapsuleFileError(f"cannot write {path}: {error.strerror or error}") from error
        if self.max_bytes is not None:
            self.evict(self.max_bytes)
        return len(file.getvalue())

    def files(self) -> list[StoredFile]:
        """All images, those that were not used for longest first."""
        return sorted(self._files(), key=lambda file: (file.used, file.path))

    def about(self, file: StoredFile) -> StoredImage:
        """What a file says of its image, its header checked.

        Raises:
            CapsuleFileError: it was removed, truncated or changed.
        """
        try:
            header = Container(BytesIO(self._fs.cat_file(file.path)), file.path).header
            return StoredImage(file.path, file.nbytes, int(header["tokens"]), float(header["quality"]))
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise CapsuleFileError(f"{file.path} cannot be read: {error!r}") from error

    def evict(self, max_bytes: int) -> int:
        """Remove images, those first that were not used for longest, until the rest takes `max_bytes`.

        Returns:
            How many went.
        """
        lock = only_writer(Path(self._root)) if self._local and Path(self._root).is_dir() else nullcontext()
        with lock:
            found = self.files()
            left, gone = sum(file.nbytes for file in found), 0
            for file in found:
                if left <= max_bytes:
                    break
                self._remove(file.path)
                left, gone = left - file.nbytes, gone + 1
        return gone

    def _candidates(self, key: ImageKey, folder: str) -> list[str]:
        """Files that may hold an image, best first."""
        if self.reuse == "prefix":
            return [f"{folder}/{_name(key)}"]
        return sorted(self._fs.glob(f"{folder}/{key.image}-*{_ALONE}{_SUFFIX}"))

    def _files(self) -> Iterator[StoredFile]:
        try:
            found: list[Any] = list(self._fs.find(self._root, detail=True).values())
        except OSError:
            return
        for about in found:
            if str(about["name"]).endswith(_SUFFIX):
                used = about.get("mtime") or about.get("LastModified") or about.get("created") or 0.0
                used = used.timestamp() if hasattr(used, "timestamp") else used
                yield StoredFile(str(about["name"]), int(about["size"]), float(used))

    def _folder(self, capsule: KVCapsule, dtype: torch.dtype) -> str:
        scope = f"{capsule.info.fingerprint} {learnt_fingerprint(capsule)} {dtype}"
        return f"{self._root.rstrip('/')}/{sha256(scope.encode()).hexdigest()[:32]}"

    def _remove(self, path: str) -> None:
        with suppress(OSError):  # another process was faster, or the place is read-only
            self._fs.rm_file(path)

    def _warn(self, what: str) -> None:
        warnings.warn(f"store {self.url}: {what}; the image is read anew", CapsuleStoreWarning, stacklevel=4)


def _name(key: ImageKey) -> str:
    return f"{key.image}-{key.before}{_ALONE if key.first else ''}{_SUFFIX}"
