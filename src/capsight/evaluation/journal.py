"""`Journal`: answered items on disk, line by line, so that an interrupted evaluation goes on where it was."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from capsight.errors import OptionError
from capsight.evaluation.record import ItemRecord


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
        wanted: dict[str, Any] = json.loads(json.dumps(settings))  # as they will be read
        try:
            if path.exists():
                self._read(wanted)
            else:
                self._append(wanted)
        except OSError as error:
            raise OptionError(f"cannot write {path}: {error.strerror or error}") from error

    def add(self, record: ItemRecord) -> None:
        """Write one item; it is on disk when this returns."""
        self.done[record.item] = record
        self._append(record.to_json())

    def remove(self) -> None:
        """Delete the file: the results are complete and stand elsewhere."""
        self._path.unlink(missing_ok=True)

    def _append(self, values: Mapping[str, Any]) -> None:
        line = json.dumps(values, ensure_ascii=False).encode() + b"\n"
        with self._path.open("ab") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())

    def _read(self, settings: dict[str, Any]) -> None:
        complete, _, cut = self._path.read_bytes().rpartition(b"\n")
        if cut:  # the line that was being written when the run ended
            os.truncate(self._path, len(complete) + (1 if complete else 0))
        if not complete:
            self._append(settings)
            return
        lines = complete.split(b"\n")
        for number, line in enumerate(lines, 1):
            try:
                values = json.loads(line)
                if number == 1:
                    self._compare(values, settings)
                else:
                    record = ItemRecord.from_json(values)
                    self.done[record.item] = record
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                if isinstance(error, OptionError):
                    raise
                raise OptionError(f"{self._path}, line {number} is damaged; delete the file") from error

    def _compare(self, recorded: dict[str, Any], settings: dict[str, Any]) -> None:
        names = sorted(recorded.keys() | settings.keys())
        if differing := [name for name in names if recorded.get(name) != settings.get(name)]:
            raise OptionError(
                f"{self._path} was begun with other settings ({', '.join(differing)}); delete it, or write "
                "to another file"
            )
