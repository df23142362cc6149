"""`TokenPositions`: where tokens stand, and how far their keys are turned; shared by all layers of a pass."""

from __future__ import annotations

from torch import Tensor

from capsight.kvcapsule.codecs.rotary import Rotary


class TokenPositions:
    """Positions of T tokens, with the tables of the rotations made of them, each worked out once.

    Attributes:
        thw: int64 `[3, T]`, time, height and width; alike where RoPE has one dimension.
    """

    def __init__(self, thw: Tensor) -> None:
        """Take positions."""
        self.thw = thw
        self._tables: dict[object, tuple[Tensor, Tensor]] = {}

    def tables(self, rotary: Rotary) -> tuple[Tensor, Tensor]:
        """Cosines and sines of `rotary` for these tokens: float32 `[T, P]` each."""
        if rotary.key not in self._tables:
            self._tables[rotary.key] = rotary.tables(self.thw)
        return self._tables[rotary.key]
