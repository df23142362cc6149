"""Where commands write: checked before the work, replaced in one step, `-` for standard output."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from capsight import files
from capsight.errors import OptionError

STDOUT = Path("-")


def check_out(path: Path | None, must_stay: bool = False, others: Iterable[Path | None] = ()) -> None:
    """Refuse a file that cannot be written, before the long work starts.

    Args:
        path: where to; None: nowhere.
        must_stay: whether it has to stay in a file.
        others: what the command reads, or writes, beside it.

    Raises:
        OptionError: it is one of the others, its folder is missing, or it or its folder does not let itself
            be written.
    """
    if path is not None and any(other is not None and _same(path, other) for other in others):
        raise OptionError(f"{path} is named twice, and one would be written over the other; name another")
    if path is None or (path == STDOUT and not must_stay):
        return
    try:
        if path.is_dir():
            raise OptionError(f"{path} is a folder; name a file")
        if must_stay and not is_kept(path):
            raise OptionError(f"cannot write {path}: it keeps nothing; name a file")
        if path.exists() and not os.access(path, os.W_OK):
            raise OptionError(f"cannot write {path}: it is write-protected")
        if is_kept(path):
            target = path.resolve()
            if not target.parent.is_dir():
                raise OptionError(f"the folder of {path} does not exist; make it first")
            with tempfile.TemporaryFile(dir=target.parent):
                pass
    except OptionError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        raise OptionError(f"cannot write {path}: {_reason(error)}") from error


def is_kept(path: Path) -> bool:
    """Whether what is written stays in a file: not on the standard output, in a device or in a pipe."""
    return path != STDOUT and (path.is_file() or not path.exists())


def check_folder(path: Path, *names: str) -> None:
    """Refuse a folder that cannot be made or written into, before the long work starts.

    Args:
        path: of the folder.
        names: of the files that will be written there.

    Raises:
        OptionError: it cannot, or a name is that of a folder in it.
    """
    try:
        files.check_folder(path)
    except (OSError, ValueError, RuntimeError) as error:
        raise OptionError(f"cannot write {path}: {_reason(error)}") from error
    for name in names:
        if (path / name).exists():
            check_out(path / name)


def write(path: Path, data: bytes) -> None:
    """Write a file in one step: it is there whole, or as it was before.

    Args:
        path: of the file; `-` is standard output. Links are followed, devices and pipes written into.
        data: its content.

    Raises:
        OptionError: it cannot be written.
    """
    if path == STDOUT:
        sys.stdout.flush()
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
        return
    try:
        if is_kept(path):
            files.replace_file(path.resolve(), data)
        else:
            path.write_bytes(data)
    except OSError as error:
        raise OptionError(f"cannot write {path}: {_reason(error)}") from error


def _same(path: Path, other: Path) -> bool:
    """Whether two paths are one file, which is there or would be made, or both the standard output."""
    try:
        if path == STDOUT or not is_kept(path):
            return path == other == STDOUT
        return path.resolve() == other.resolve() or os.path.samefile(path, other)
    except (OSError, ValueError, RuntimeError):
        return False  # one of them is not there


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
