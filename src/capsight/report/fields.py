"""`Fields`: a JSON object that is read field by field, with errors that name file, place and remedy."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from capsight.errors import CapsuleFileError


class Fields:
    """One object of a JSON file.

    Every method raises CapsuleFileError where the field is missing or is not what it should be.
    """

    def __init__(self, values: Any, path: Path, place: str, writer: str) -> None:
        """Wrap an object.

        Args:
            values: the object.
            path: of the file, for errors.
            place: where in the file the object is; empty for the whole file.
            writer: the command that writes such files.
        """
        self._path, self._place, self._writer = path, place, writer
        if not isinstance(values, dict):
            self._fail("", values, "an object")
        self._values: dict[str, Any] = values

    @classmethod
    def read(cls, path: Path, writer: str) -> Fields:
        """Read a file that `writer` wrote."""
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise CapsuleFileError(f"cannot read {path}: {error.strerror or error}") from error
        except RecursionError as error:
            raise CapsuleFileError(f"{path} is nested too deeply; write it again with `{writer}`") from error
        except ValueError as error:  # also what is not UTF-8
            raise CapsuleFileError(f"{path} is not JSON ({error}); write it again with `{writer}`") from error
        return cls(values, path, "", writer)

    def number(self, name: str) -> float:
        """A finite number."""
        return self._number(name, self._values.get(name))

    def count(self, name: str) -> int:
        """A whole number, 0 or more."""
        value = self._values.get(name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            self._fail(name, value, "a whole number, 0 or more")
        return value

    def positive(self, name: str) -> float:
        """A number above 0."""
        value = self.number(name)
        if value <= 0:
            self._fail(name, value, "a number above 0")
        return value

    def text(self, name: str) -> str:
        """A string."""
        value = self._values.get(name)
        if not isinstance(value, str):
            self._fail(name, value, "a string")
        return value

    def interval(self, name: str) -> tuple[float, float]:
        """Two finite numbers, ascending."""
        value = self._values.get(name)
        if not isinstance(value, list) or len(value) != 2:
            self._fail(name, value, "two numbers")
        low, high = (self._number(name, end) for end in value)
        if low > high:
            self._fail(name, value, "two ascending numbers")
        return low, high

    def items(self, name: str, kind: type) -> list[Any]:
        """A list whose entries are all of a kind."""
        value = self._values.get(name)
        if not isinstance(value, list) or not all(isinstance(entry, kind) for entry in value):
            self._fail(name, value, f"a list of {kind.__name__}")
        return value

    def rows(self, name: str) -> list[Fields]:
        """A list of objects."""
        values = self.items(name, dict)
        return [
            Fields(row, self._path, self._inner(f"{name}[{i}]"), self._writer) for i, row in enumerate(values)
        ]

    def object(self, name: str) -> Fields:
        """An object."""
        return Fields(self._values.get(name), self._path, self._inner(name), self._writer)

    def named(self, name: str) -> Iterator[tuple[str, Fields]]:
        """The entries of an object of objects."""
        inner = self.object(name)
        for key in inner._values:
            yield key, inner.object(key)

    def has(self, name: str) -> bool:
        """Whether the field is there and is not null."""
        return self._values.get(name) is not None

    def raw(self) -> dict[str, Any]:
        """The object itself."""
        return self._values

    def fail(self, message: str) -> NoReturn:
        """Refuse the file."""
        raise CapsuleFileError(f"{self._path}: {message}; write it again with `{self._writer}`")

    def _inner(self, name: str) -> str:
        return f"{self._place}.{name}" if self._place else name

    def _number(self, name: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            self._fail(name, value, "a number")
        return float(value)

    def _fail(self, name: str, value: Any, expected: str) -> NoReturn:
        place = self._inner(name).rstrip(".") or "the file"
        shown = "missing" if value is None else repr(value)[:60]
        self.fail(f"{place} is {shown}, expected {expected}")
