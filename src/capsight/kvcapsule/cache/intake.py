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
        fresh: bool `[M]`, which of the placement's runs they are.
        blocks: int64 `[M' * N]`, flat positions of their tokens.
        exact: int64 `[E]`, flat positions of the tokens that stay exact.
    """

    placement: Placement
    runs: tuple[Run, ...]
    fresh: Tensor
    blocks: Tensor
    exact: Tensor

    @classmethod
    def build(cls, placement: Placement, stored: Sequence[Run]) -> Intake:
        """Store what `placement` covers, of which `stored` runs are capsules already."""
        known, length, device = set(stored), placement.settled, placement.run_rows.device
        fresh = torch.tensor([run not in known for run in placement.runs], dtype=torch.bool, device=device)
        slots = placement.run_slots(length).view(len(fresh), placement.block_size)
        return cls(
            placement,
            tuple(run for run in placement.runs if run not in known),
            fresh,
            slots[fresh].flatten(),
            placement.exact_slots(length),
        )
