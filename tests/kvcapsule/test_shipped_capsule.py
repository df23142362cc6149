"""The capsule that ships, asked questions of every kind: what it must go on answering."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest

import capsight
from capsight.evaluation import ask_item, exact_match, reference_items
from capsight.evaluation.items import Item
from capsight.reference.questions import TASKS

OF_EACH = 2
NOT_LEARNT = {"odd_one_out"}
"""Kinds that the model does not answer with the full cache either."""


def items() -> Iterator[Item]:
    """Prompts of the calibration split, far behind those of the fit: two questions a kind."""
    wanted = Counter(dict.fromkeys(set(TASKS) - NOT_LEARNT, OF_EACH))
    for index in range(2000, 2100):
        for images in (2, 4):
            (item,) = reference_items("calibration", images, 1, first=index)
            asks = []
            for ask in item.asks:
                if wanted[ask.task] > 0:
                    wanted[ask.task] -= 1
                    asks.append(ask)
            if asks:
                yield Item(item.name, item.images, tuple(asks))
        if not +wanted:
            return


@pytest.mark.parametrize("retained", [0.05, 0.02])
def test_every_kind_is_answered(retained):
    """All that the full cache answers, at the default and where bits are scarce: at most one slip."""
    model, processor = capsight.load_reference_vlm()
    capsule = capsight.KVCapsule.from_pretrained("reference").with_retained(retained)
    right, asked = Counter[str](), 0
    with capsight.enable(model, capsule=capsule) as fast:
        for item in items():
            answers = ask_item(fast, processor, item)
            for text, ask in zip(answers.texts, item.asks, strict=True):
                right[ask.task] += exact_match(text, ask.answer)
                asked += 1
            assert answers.nbytes < 0.2 * answers.nbytes_full
    assert asked == OF_EACH * (len(TASKS) - len(NOT_LEARNT))
    assert right.total() >= asked - 1
