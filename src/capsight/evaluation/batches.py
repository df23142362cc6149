"""Questions over one cache, in as few batches as the model can read rightly."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from capsight.kvcapsule.cache.stock import has_states, repeat_rows

T = TypeVar("T")


def in_batches(
    cache: Any,
    tails: Sequence[list[int]],
    ask: Callable[[Any, list[list[int]]], tuple[list[T], Tensor]],
    copied: Callable[[Any], Any] = copy.deepcopy,
) -> tuple[list[T], Tensor]:
    """Ask questions over a cache of one row: all at once, or those of one length where there are states.

    Padding between the images and a shorter question is hidden from attention, but the states of linear
    attention and convolutions run through it.

    Args:
        cache: of one row; of no use afterwards.
        tails: tokens of each question.
        ask: answers and `[Q, V]` logits of some questions, over a cache with a row for each.
        copied: makes a copy of a cache.

    Returns:
        All answers and logits, in the order of `tails`.
    """
    stateful = any(map(has_states, cache.layers))
    lengths = sorted({len(tail) if stateful else 0 for tail in tails})
    texts: dict[int, T] = {}
    logits: dict[int, Tensor] = {}
    for length in lengths:
        rows = [row for row, tail in enumerate(tails) if not stateful or len(tail) == length]
        repeated = cache if length == lengths[-1] else copied(cache)
        repeat_rows(repeated, len(rows))
        answered, first = ask(repeated, [tails[row] for row in rows])
        texts |= zip(rows, answered, strict=True)
        logits |= zip(rows, first, strict=True)
    return [texts[row] for row in sorted(texts)], torch.stack([logits[row] for row in sorted(logits)])
