"""`Place`: where a store lies, a folder or any place that fsspec knows; its errors are all of one kind."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from capsight.errors import CapsuleFileError, OptionError
from capsight.files import only_writer, replace_file

SUFFIX = ".capsule"
_FILE = re.compile(r"[0-9a-f]{32}/[0-9a-f]{32}-[0-9a-f]{32}(-first)?\.capsule")
_HALF = re.compile(r"[0-9a-f]{32}/\.[0-9a-f]{32}-[0-9a-f]{31}\.[^./]+")
_ABANDONED = 3600
"""Seconds after which a file that was never finished is of a writer that was killed."""


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


class Place:
    """Files by name, each in a folder of the root; other files that lie there are left alone."""

    def __init__(self, url: str | os.PathLike[str]) -> None:
        """Name a place; it need not be there.

        Raises:
            OptionError: it is no name of a place, or fsspec does not know such places.
        """
        name = os.fspath(url) if isinstance(url, str | os.PathLike) else None
        if not isinstance(name, str) or not name:
            raise OptionError(f"a store lies in a folder, or at a url that fsspec knows, not {url!r}")
        try:
            self._fs, root = fsspec.core.url_to_fs(name)
        except Exception as error:  # every file system has its own
            raise OptionError(f"there is no store at {name!r}: {error}") from error
        self.url, self._root = name, str(root)
        self._local = isinstance(self._fs, LocalFileSystem)

    def path(self, name: str) -> str:
        """The path of the file `folder/name`."""
        return f"{self._root.rstrip('/')}/{name}"

    def read(self, path: str) -> bytes | None:
        """A file; None where there is none.

        Raises:
            CapsuleFileError: it cannot be read.
        """
        try:
            with _errors(f"cannot read {path}"):
                data: bytes = self._fs.cat_file(path)
        except FileNotFoundError:
            return None
        return data

    def mark_used(self, path: str) -> None:
        """Have a file count as used just now, where the place is a folder."""
        if self._local:
            with suppress(OSError):  # read-only, or removed meanwhile: it was read all the same
                os.utime(path)

    def write(self, path: str, data: bytes) -> None:
        """Put a file there in one step.

        Raises:
            CapsuleFileError: it cannot be written; what was there is unharmed.
        """
        with _errors(f"cannot write {path}"):
            if self._local:
                Path(path).parent.mkdir(parents=True, exist_ok=True)
                replace_file(Path(path), data)
            else:
                self._fs.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
                self._fs.pipe_file(path, data)

    def remove(self, path: str) -> bool:
        """Whether a file is gone."""
        try:
            self._fs.rm_file(path)
        except FileNotFoundError:  # another process was faster
            return True
        except Exception:  # the place is read-only, or cannot be reached
            return False
        return True

    def beginning(self, name: str) -> list[str]:
        """Files whose folder and name begin with `folder/name`.

        Raises:
            CapsuleFileError: the folder cannot be read.
        """
        start = self.path(name)
        try:
            with _errors(f"cannot read {start}"):
                paths: list[Any] = self._fs.ls(start.rsplit("/", 1)[0], detail=False)
        except FileNotFoundError:
            return []
        return sorted(str(path) for path in paths if str(path).startswith(start))

    def files(self) -> list[StoredFile]:
        """All files of the store, those that were not used for longest first."""
        files = [file for file in self._all() if _FILE.fullmatch(self._name(file.path))]
        return sorted(files, key=lambda file: (file.used, file.path))

    def alone(self) -> AbstractContextManager[object]:
        """Keeps others that come here waiting, where the place is a folder."""
        return only_writer(Path(self._root)) if self._local and Path(self._root).is_dir() else nullcontext()

    def tidy(self) -> None:
        """Remove what writers left that were killed."""
        for file in self._all() if self._local else ():
            if _HALF.fullmatch(self._name(file.path)) and file.used < time.time() - _ABANDONED:
                self.remove(file.path)

    def _name(self, path: str) -> str:
        return path.removeprefix(self._root).lstrip("/")

    def _all(self) -> Iterator[StoredFile]:
        try:
            entries: list[Any] = list(self._fs.find(self._root, detail=True).values())
        except Exception:  # not there, or not to be reached: nothing can be removed either
            return
        for about in entries:
            used = about.get("mtime") or about.get("LastModified") or about.get("created") or 0.0
            used = used.timestamp() if hasattr(used, "timestamp") else used
            yield StoredFile(str(about["name"]), int(about["size"]), float(used))


@contextmanager
def _errors(what: str) -> Iterator[None]:
    """Turn the errors of any file system into one kind, but for files that are not there."""
    try:
        yield
    except FileNotFoundError:
        raise
    except Exception as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error) or repr(error)
        raise CapsuleFileError(f"{what}: {reason}") from error
