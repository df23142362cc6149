"""What is evaluated: images, questions and right answers, from the reference task or from user files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from capsight.errors import OptionError
from capsight.reference.prompts import Split, split_prompt


@dataclass(frozen=True, slots=True)
class Ask:
    """One question about an item's images."""

    question: str
    answer: str
    task: str = "all"


@dataclass(frozen=True, slots=True)
class Item:
    """Images and the questions asked of them, each on its own."""

    name: str
    images: tuple[Image.Image, ...]
    asks: tuple[Ask, ...]


def reference_items(split: Split, images: int, count: int, first: int = 0) -> Iterator[Item]:
    """Prompts of the reference task: six questions each, always the same for the same arguments.

    Args:
        split: "calibration" or "test".
        images: images in each prompt.
        count: number of prompts.
        first: index of the first one.
    """
    for index in range(first, first + count):
        prompt = split_prompt(split, index, images)
        asks = tuple(Ask(q.text, q.answer, q.task) for q in prompt.questions)
        yield Item(f"{split}/{images}/{index}", tuple(s.image for s in prompt.scenes), asks)


def jsonl_items(path: Path) -> Iterator[Item]:
    """Items from lines of JSON: ``{"images": [paths], "question": text, "answer": text, "task": name}``.

    Image paths are relative to the file; `answer` and `task` may be missing.

    Raises:
        OptionError: the file, a line or an image cannot be read; says which.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(f"cannot read {path}: {error}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
            names, question = row["images"], row["question"]
            if not isinstance(names, list) or not isinstance(question, str):
                raise TypeError("images must be a list of paths and question a text")
        except (ValueError, KeyError, TypeError) as error:
            expected = '{"images": [...], "question": "..."}'
            raise OptionError(f"{where}: expected {expected} ({error})") from error
        images = tuple(open_image(path.parent / str(name)) for name in names)
        yield Item(where, images, (Ask(question, str(row.get("answer", "")), str(row.get("task", "all"))),))


def open_image(path: Path) -> Image.Image:
    """Read an image file as RGB.

    Raises:
        OptionError: it is missing or no image.
    """
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, UnidentifiedImageError) as error:
        raise OptionError(f"cannot read the image {path}: {error}") from error
