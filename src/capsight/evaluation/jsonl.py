"""Items from a user's file: one JSON object a line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from typing import Any, NoReturn

from capsight.errors import OptionError
from capsight.evaluation.items import Ask, Item
from capsight.pictures import open_image

_EXPECTED = 'expected {"images": [paths], "question": text, "answer": text or list of texts}'


class _Number(str):
    """A number as it is written, so that an answer of 3.50 is not 3.5."""


def jsonl_items(path: Path) -> Iterator[Item]:
    """Items from lines of JSON: ``{"images": [paths], "question": text, "answer": text, "task": name}``.

    Image paths are relative to the file. `answer` may be a text, a number, a list of these, each of which
    is right, or null; `answers` is another name for it. Without one the question is asked and not scored.
    `task` may be missing or null. Files are UTF-8, with or without a byte-order mark; lines end in LF, CRLF
    or CR.

    Raises:
        OptionError: the file, a line or an image cannot be read; says which.
    """
    try:
        data = path.read_bytes()
        lines = StringIO(data.decode("utf-8-sig"), newline=None)  # ends lines at LF, CRLF and CR only
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise OptionError(f"cannot read {path}, line {line}: it is not UTF-8") from error
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise OptionError(f"cannot read {path}: {reason}") from error
    for number, text in enumerate(lines, 1):
        text = text.strip(" \t\r\n\ufeff")  # files that were joined have byte-order marks in the middle
        if text:
            yield _item(text, path, f"{path}, line {number}")


def _item(line: str, path: Path, where: str) -> Item:
    try:
        row = json.loads(
            line,
            parse_int=_Number,
            parse_float=_Number,
            parse_constant=_not_json,
            object_pairs_hook=_object,
        )
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise OptionError(f"{where}: {_EXPECTED} ({reason})") from error
    if not isinstance(row, dict):
        _refuse(where, f"the line is {_shown(row)}")
    names, question, task = row.get("images"), row.get("question"), row.get("task")
    task = "all" if task is None else task
    if not isinstance(names, list) or not all(_is_text(name) for name in names):
        _refuse(where, f"images is {_shown(names)}")
    if not _is_text(question):
        _refuse(where, f"question is {_shown(question)}")
    if not isinstance(task, str):
        _refuse(where, f"task is {_shown(task)}")
    first, *others = _references(row, where) or ("",)
    try:
        images = tuple(open_image(path.parent / name) for name in names)
    except OptionError as error:
        raise OptionError(f"{where}: {error}") from error
    return Item(where, images, (Ask(str(question), first, str(task), tuple(others)),))


def _references(row: dict[str, Any], where: str) -> tuple[str, ...]:
    """The right answers of a line, each once."""
    given = {name: row[name] for name in ("answer", "answers") if row.get(name) is not None}
    if len(given) > 1:
        _refuse(where, "both answer and answers are there; give one of them, with every right answer")
    for name, value in given.items():
        texts = value if isinstance(value, list) else [value]
        for text in texts:
            if not isinstance(text, str) or not text.strip() or not _is_encodable(text):
                _refuse(where, f"{name} is {_shown(value)}")
        if not texts:
            _refuse(where, f"{name} is empty; leave it out where no answer is known")
        return tuple(dict.fromkeys(str(text) for text in texts))
    return ()


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and not isinstance(value, _Number) and _is_encodable(value)


def _is_encodable(text: str) -> bool:
    """Whether it has no half of a surrogate pair, which JSON can write and no tokenizer reads."""
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


def _shown(value: Any) -> str:
    if value is None:
        return "missing"
    return ascii(value) if len(ascii(value)) < 60 else f"{ascii(value)[:57]}..."


def _refuse(where: str, what: str) -> NoReturn:
    raise OptionError(f"{where}: {what}; {_EXPECTED}")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("a key is there twice")
    return values


def _not_json(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")
