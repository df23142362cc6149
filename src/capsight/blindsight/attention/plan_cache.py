"""Remembers plans: all layers ask for the same few, and those of earlier prompts are soon of no use."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from functools import wraps
from typing import Protocol, TypeVar

import torch

from capsight.blindsight.attention.work import Work

PLANS = 64
"""Plans kept at most (a batch asks for one per row and category)."""

BYTES = 256 << 20
"""Bytes of masks kept at most; the masks of a chunked prefill add up to those of the whole prompt."""


class Sized(Protocol):
    """A plan that knows its size."""

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        ...


P = TypeVar("P", bound=Sized)
Make = Callable[[Work, torch.device], P]


def remembered(make: Make[P]) -> Make[P]:
    """`make`, called once for equal arguments as long as the plan is among the last ones used.

    The plan used last is always kept, however large. Safe to call from several threads.
    """
    plans: OrderedDict[tuple[Work, torch.device], P] = OrderedDict()
    lock = threading.Lock()

    @wraps(make)
    def plan_of(work: Work, device: torch.device) -> P:
        with lock:
            if (work, device) in plans:
                plans.move_to_end((work, device))
                return plans[work, device]
        plan = make(work, device)
        with lock:
            plans[work, device] = plan
            total = sum(cached.nbytes for cached in plans.values())
            while len(plans) > 1 and (total > BYTES or len(plans) > PLANS):
                total -= plans.popitem(last=False)[1].nbytes
        return plan

    return plan_of
