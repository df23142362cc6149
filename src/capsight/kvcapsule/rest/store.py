"""`CapsuleStore`: a folder (or any place fsspec knows) of images that models have read, at rest.

One file an image. Its name is a hash of the image's pixels and one of all that stood before it; the folder's
one of the model, the capsule and the dtype. Files are replaced in one step and check themselves, so any
number of processes may share a store.
"""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from hashlib import sha256
from io import BytesIO
from typing import Literal

import torch
from torch import Tensor

from capsight.errors import CapsuleFileError, CapsuleStoreWarning, OptionError
from capsight.kvcapsule.capsule import KVCapsule
from capsight.kvcapsule.rest.container import Container, write_container
from capsight.kvcapsule.rest.latents import DEFAULT_QUALITY, check_quality, code, decode
from capsight.kvcapsule.rest.parts import joint_codec, learnt_fingerprint
from capsight.kvcapsule.rest.place import SUFFIX, Place, StoredFile

Reuse = Literal["prefix", "anywhere"]
_KIND, _ALONE = "image", "-first"


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
        self._place = Place(url)
        self.url, self.quality, self.max_bytes = self._place.url, check_quality(quality), max_bytes
        self.reuse: Reuse = reuse
        if max_bytes is not None:
            _check_size(max_bytes, 1)

    def get(self, key: ImageKey, capsule: KVCapsule, dtype: torch.dtype) -> Tensor | None:
        """Latents float32 `[T, R]` of an image; None where the store does not have it.

        A file that was damaged is removed, with a warning, and counts as missing.

        Raises:
            OptionError: the capsule is not of the joint codec, or the entropy coder is not installed.
        """
        rank = joint_codec(capsule).levels.rank
        for path in self._candidates(key, _folder(capsule, dtype)):
            try:
                data = self._place.read(path)
            except CapsuleFileError as error:
                self._warn(str(error))
                continue
            if data is None:  # another process has removed it
                continue
            try:
                opened = Container(BytesIO(data), path)
                if (opened.header.get("kind"), opened.header.get("name")) != (_KIND, _name_of(path)):
                    raise CapsuleFileError(f"{path} holds something else than its name says")
                latents = decode(opened.piece(0), int(opened.header["tokens"]), rank)
            except (CapsuleFileError, KeyError, TypeError, ValueError) as error:
                gone = self._place.remove(path)
                self._warn(f"{error}; it {'is removed' if gone else 'cannot be removed'}")
                continue
            self._place.mark_used(path)
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
        piece = code(latents, joint_codec(capsule).lost, self.quality)
        path = self._place.path(f"{_folder(capsule, dtype)}/{_name(key)}")
        header = {"kind": _KIND, "name": _name_of(path), "tokens": len(latents), "quality": self.quality}
        file = BytesIO()
        write_container(file, header, [piece])
        self._place.write(path, file.getvalue())
        if self.max_bytes is not None:
            self.evict(self.max_bytes)
        return len(file.getvalue())

    def files(self) -> list[StoredFile]:
        """All images, those that were not used for longest first."""
        return self._place.files()

    def about(self, file: StoredFile) -> StoredImage:
        """What a file says of its image, its header checked.

        Raises:
            CapsuleFileError: it was removed, truncated or changed.
        """
        try:
            header = Container(BytesIO(self._place.read(file.path) or b""), file.path).header
            return StoredImage(file.path, file.nbytes, int(header["tokens"]), float(header["quality"]))
        except (KeyError, TypeError, ValueError) as error:
            raise CapsuleFileError(f"{file.path} cannot be read: {error!r}") from error

    def evict(self, max_bytes: int) -> int:
        """Remove images, those first that were not used for longest, until the rest takes `max_bytes`.

        Returns:
            How many went.

        Raises:
            OptionError: that is no number of bytes.
        """
        _check_size(max_bytes, 0)
        with self._place.alone():
            self._place.tidy()
            files = self.files()
            left, gone = sum(file.nbytes for file in files), 0
            for file in files:
                if left <= max_bytes:
                    break
                if self._place.remove(file.path):
                    left, gone = left - file.nbytes, gone + 1
        return gone

    def _candidates(self, key: ImageKey, folder: str) -> list[str]:
        """Files that may hold an image, best first."""
        exact = self._place.path(f"{folder}/{_name(key)}")
        if self.reuse == "prefix":
            return [exact]
        try:
            paths = self._place.beginning(f"{folder}/{key.image}-")
        except CapsuleFileError as error:
            self._warn(str(error))
            return []
        alone = [path for path in paths if path.endswith(f"{_ALONE}{SUFFIX}")]
        return sorted(alone, key=lambda path: path != exact)

    def _warn(self, what: str) -> None:
        warnings.warn(f"store {self.url}: {what}; the image is read anew", CapsuleStoreWarning, stacklevel=4)


def _check_size(max_bytes: int, least: int) -> None:
    if isinstance(max_bytes, bool) or not isinstance(max_bytes, int) or max_bytes < least:
        raise OptionError(f"max_bytes is a positive number of bytes (10 << 30), not {max_bytes!r}")


def _folder(capsule: KVCapsule, dtype: torch.dtype) -> str:
    scope = f"{capsule.info.fingerprint} {learnt_fingerprint(capsule)} {dtype}"
    return sha256(scope.encode()).hexdigest()[:32]


def _name(key: ImageKey) -> str:
    return f"{key.image}-{key.before}{_ALONE if key.first else ''}{SUFFIX}"


def _name_of(path: str) -> str:
    """Folder and name of a file, wherever the store lies."""
    return "/".join(path.split("/")[-2:])
