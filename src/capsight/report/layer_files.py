"""Reconstruction errors per layer, read and checked; budgets and head maps have readers of their own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from capsight.report.fields import Fields

_WRITER = "capsight report --help"


@dataclass(frozen=True, slots=True)
class LayerErrors:
    """Relative errors of rebuilt keys and values; the file is `{"layers": [{"index", "keys", "values"}]}`.

    The relative error is the norm of the difference over the norm of the original, on images not
    used for fitting: 0 is perfect, 1 is as bad as zeros.

    Attributes:
        index: of each layer.
        keys: error of its keys.
        values: error of its values.
    """

    index: tuple[int, ...]
    keys: tuple[float, ...]
    values: tuple[float, ...]


def read_errors(path: Path) -> LayerErrors:
    """Read a file.

    Raises:
        CapsuleFileError: it cannot be read, or is not as described at `LayerErrors`.
    """
    fields = Fields.read(path, _WRITER)
    rows = sorted(
        (row.count("index"), row.number("keys"), row.number("values")) for row in fields.rows("layers")
    )
    if not rows:
        fields.fail("there are no layers")
    index, keys, values = zip(*rows, strict=True)
    return LayerErrors(index, keys, values)
