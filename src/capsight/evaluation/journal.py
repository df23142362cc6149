"""`Journal`: answered items on disk, line by line, so that an interrupted evaluation goes on where it was.

Each item's line carries a checksum over it and the line of settings: one that was changed, or is of another
run, is refused.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from capsight.errors import OptionError
from capsight.evaluation.record import ItemRecord

_CHECKSUM = "sha256"


class Journal:
    """The file beside the results: a line of settings, then a line per item, each written at once.

    Attributes:
        done: what the file holds already, by item name.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        """Open the file, or begin it.

        Args:
            path: of the file.
            settings: everything that the results depend on, JSON-ready.

        Raises:
            OptionError: the file was begun with other settings, is damaged, or cannot be written.
        """
        self._path = path
        self.done: dict[str, ItemRecord] = {}
        self._settings: dict[str, Any] = json.loads(json.dumps(settings))  # as they will be read
        try:
            if path.exists():
                self._read()
            else:
                self._append(self._settings)
        except OSError as error:
            raise OptionError(f"cannot write {path}: {error.strerror or error}") from error

    def add(self, record: ItemRecord) -> None:
        """Write one item; it is on disk when this returns.

        Raises:
            OptionError: the file cannot be written.
        """
        values = record.to_json()
        try:
            self._append(values | {_CHECKSUM: self._checksum(values)})
        except OSError as error:
            raise OptionError(
                f"cannot write {self._path}: {error.strerror or error}; what it holds is not asked again"
            ) from error
        self.done[record.item] = record

    def remove(self) -> None:
        """Delete the file: the results are complete and stand elsewhere."""
        self._path.unlink(missing_ok=True)

    def _append(self, values: Mapping[str, Any]) -> None:
        with self._path.open("ab") as file:
            file.write(_line(values))
            file.flush()
            os.fsync(file.fileno())

    def _checksum(self, values: Mapping[str, Any]) -> str:
        text = json.dumps([self._settings, values], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def _read(self) -> None:
        *lines, cut = self._path.read_bytes().split(b"\n")
        if not lines and not _line(self._settings).startswith(cut):
            raise OptionError(f"{self._path} is no journal of an evaluation; move it away")
        for number, line in enumerate(lines, 1):
            try:
                values = json.loads(line)
                if number == 1:
                    self._compare(values)
                elif values.pop(_CHECKSUM) != self._checksum(values):
                    raise ValueError("its checksum is wrong")
                else:
                    record = ItemRecord.from_json(values)
                    self.done[record.item] = record
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                if isinstance(error, OptionError):
                    raise
                remedy = "the file" if number == 1 else "that line, and its prompt is asked again"
                raise OptionError(f"{self._path}, line {number} is damaged; delete {remedy}") from error
        if cut:  # the line that was being written when the run ended
            os.truncate(self._path, self._path.stat().st_size - len(cut))
        if not lines:
            self._append(self._settings)

    def _compare(self, recorded: dict[str, Any]) -> None:
        settings = self._settings
        names = sorted(recorded.keys() | settings.keys())
        if differing := [name for name in names if recorded.get(name) != settings.get(name)]:
            raise OptionError(
                f"{self._path} was begun with other settings ({', '.join(differing)}); delete it, or write "
                "to another file"
            )


def _line(values: Mapping[str, Any]) -> bytes:
    return json.dumps(values, ensure_ascii=False).encode() + b"\n"
