"""`Intake`: which of the tokens that a layer was given become capsules, and which stay exact."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from capsight.kvcapsule.cache.placement import Placement
from capsight.kvcapsule.plan import Run


@dataclass(frozen=True, slots=True, eq=False)
class Intake:
    """What storing all tokens of rows of a given length takes; the same for all layers of a forward pass.

    Attributes:
        placement: of the tokens once they are stored.
        runs: those that were no capsules before, ascending.
        order: int64 `[M]`, where each capsule lies among those stored before, then the new ones.
        blocks: int64 `[T]`, flat positions of their tokens.
        exact: int64 `[E]`, flat positions of the tokens that stay exact.
    """

    placement: Placement
    runs: tuple[Run, ...]
    order: Tensor
    blocks: Tensor
    exact: Tensor

    @classmethod
    def build(cls, placement: Placement, stored: Sequence[Run]) -> Intake:
        """Store what `placement` covers, of which `stored` runs are capsules already."""
        known, length, device = set(stored), placement.settled, placement.run_rows.device
        fresh = torch.tensor([run not in known for run in placement.runs], dtype=torch.bool, device=device)
        if placement.block_size == 1:
            fresh = fresh.repeat_interleave(placement.run_lengths)
        slots = placement.run_slots(length).view(len(fresh), placement.block_size)
        order = torch.empty(len(fresh), dtype=torch.int64, device=device)
        old = len(fresh) - int(fresh.sum())
        order[~fresh] = torch.arange(old, device=device)
        order[fresh] = torch.arange(old, len(fresh), device=device)
        return cls(
            placement,
            tuple(run for run in placement.runs if run not in known),
            order,
            slots[fresh].flatten(),
            placement.exact_slots(length),
        )
