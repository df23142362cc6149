"""What is evaluated: images, questions and right answers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from PIL import Image

from capsight.reference.prompts import Split, split_prompt


@dataclass(frozen=True, slots=True)
class Ask:
    """One question about an item's images.

    Attributes:
        question: what is asked.
        answer: the right answer, the first of them where there are several; empty where none is known.
        task: what results are grouped by.
        others: further answers that are as right.
    """

    question: str
    answer: str
    task: str = "all"
    others: tuple[str, ...] = ()

    @property
    def references(self) -> tuple[str, ...]:
        """Every right answer; none where none is known."""
        return (self.answer, *self.others) if self.answer else ()


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
