"""Files replaced in one step, and JSON headers that carry their own checksum."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from capsight.errors import CapsuleFileError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

CHECKSUM = "header_sha256"

T = TypeVar("T")


def replace_file(path: Path, content: bytes | str | Callable[[Path], object]) -> None:
    """Put a file at `path` in one step: a temporary file beside it, flushed to disk, then renamed.

    A reader sees the old file or the new one, never a part; of several writers the last one wins.

    Args:
        path: the file; its folder exists.
        content: what it holds (text as UTF-8), or what writes it to the path that it is given.

    Raises:
        OSError: it cannot be written, or is a device or a pipe; what was there before is unharmed.
    """
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise OSError(errno.EINVAL, "it is a device or a pipe, not a file", str(path))
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:32]}.")
    os.close(descriptor)
    temporary = Path(name)
    try:
        if callable(content):
            content(temporary)
        else:
            temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def check_folder(path: Path) -> None:
    """See whether a folder can be made, or written into; nothing is left behind.

    Raises:
        OSError: it cannot.
        ValueError, RuntimeError: the path is none.
    """
    nearest = path.resolve()
    while not nearest.exists():
        nearest = nearest.parent
    if not nearest.is_dir():
        raise OSError(errno.ENOTDIR, f"{nearest} is a file", str(path))
    with tempfile.TemporaryFile(dir=nearest):
        pass


@contextmanager
def only_writer(folder: Path) -> Iterator[bool]:
    """Keep other writers of a folder waiting, threads and processes alike.

    Yields:
        Whether they wait; some file systems, and Windows, cannot lock a folder.
    """
    if fcntl is None:
        yield False
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError:
            yield False
        else:
            yield True
    finally:
        os.close(descriptor)  # which releases the lock


def write_header(path: Path, kind: str, version: int, values: Mapping[str, Any]) -> None:
    """Write JSON with the format, its version, and a checksum over all of it.

    Args:
        path: the file.
        kind: what the file describes.
        version: of the format.
        values: JSON-ready values.

    Raises:
        OSError: it cannot be written.
    """
    full = json.loads(json.dumps({**values, "format": kind, "format_version": version}))  # as it will be read
    full[CHECKSUM] = _checksum(full)
    replace_file(path, json.dumps(full, indent=1, sort_keys=True) + "\n")


def read_header(path: Path, kind: str, version: int, name: str) -> dict[str, Any]:
    """What `write_header` wrote, without format, version and checksum.

    Args:
        path: the file.
        kind: what it must describe.
        version: of the format that is read.
        name: of what is saved, for errors: "capsule", "head map".

    Raises:
        CapsuleFileError: it is missing, no JSON, of another kind or version, or was changed since it was
            written.
    """
    data = read_bytes(path, name)
    try:
        header = json.loads(data)
    except (ValueError, RecursionError) as error:  # also what is not UTF-8
        raise CapsuleFileError(f"{path} is not JSON ({error}); save or download the {name} again") from error
    if not isinstance(header, dict) or header.get("format") != kind:
        raise CapsuleFileError(f"{path} does not describe a {name}")
    format_version = header.get("format_version")
    if format_version != version or isinstance(format_version, (bool, float)):
        raise CapsuleFileError(
            f"{path} has format version {format_version!r}, this capsight reads {version}; use the capsight "
            f"that wrote it, or make the {name} again"
        )
    checksum = header.pop(CHECKSUM, None)
    if checksum != _checksum(header):
        raise CapsuleFileError(
            f"{path} was changed since it was written: its checksum is wrong; save or download the {name} "
            "again"
        )
    return {key: value for key, value in header.items() if key not in ("format", "format_version")}


def read_bytes(path: Path, name: str) -> bytes:
    """The bytes of a file of a saved `name`.

    Raises:
        CapsuleFileError: it is missing or cannot be read.
    """
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise CapsuleFileError(f"{path} is missing; is this the folder of a saved {name}?") from error
    except OSError as error:
        raise CapsuleFileError(f"cannot read {path}: {error.strerror or error}") from error


def checked(kind: type[T], text: str | bytes, source: Path, remedy: str, extra: bool = False) -> T:
    """JSON as a value of a dataclass: fields are what their types say, numbers finite, nothing is converted.

    Args:
        kind: a dataclass; annotations may hold pydantic's constraints.
        text: the JSON.
        source: of the text, for errors.
        remedy: what to do about errors, such as "write it again".
        extra: whether fields that `kind` does not have are left out; else they are errors.

    Raises:
        CapsuleFileError: the text is not that; the message names the first place that is not.
    """
    from pydantic import ConfigDict, TypeAdapter, ValidationError  # takes a while

    config = ConfigDict(strict=True, allow_inf_nan=False, extra="ignore" if extra else "forbid")
    try:
        either: Any = kind | None  # of a class alone it takes no config
        value = TypeAdapter(either, config=config).validate_json(text)
        if value is not None:
            return value
        raise CapsuleFileError(f"{source}: the file is null; {remedy}")
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
    what = first["msg"].removeprefix("Value error, ").replace("Input should be", "expected")
    place = "".join(f"[{x}]" if isinstance(x, int) else f".{x}" for x in first["loc"]).lstrip(".")
    missing = first["type"].startswith("missing") or first["input"] is None
    shown = "missing" if missing else f"{first['input']!r:.60}, {what}"
    if first["type"] == "json_invalid":
        shown = f"not JSON ({what.removeprefix('Invalid JSON: ')})"
    raise CapsuleFileError(f"{source}: {place or 'the file'} is {shown}; {remedy}")


def _checksum(header: Mapping[str, Any]) -> str:
    """SHA-256 over the header, however its JSON was laid out."""
    text = json.dumps(
        {k: v for k, v in header.items() if k != CHECKSUM}, sort_keys=True, separators=(",", ":")
    )
    return hashlib.sha256(text.encode()).hexdigest()
