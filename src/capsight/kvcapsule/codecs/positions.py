"""`TokenPositions`: where tokens stand, and how far their keys are turned; shared by all layers of a pass."""

from __future__ import annotations

from torch import Tensor

from capsight.kvcapsule.codecs.rotary import Rotary


class TokenPositions:
    """Positions of T tokens, and the tables of a rotation made of them once for all layers of a pass.

    Tables are many times as large as latents: they are forgotten after the last layer.

    Attributes:
        thw: int64 `[3, T]`, time, height and width; alike where RoPE has one dimension.
    """

    def __init__(self, thw: Tensor, layers: int = 1) -> None:
        """Take positions, which `layers` layers will ask for."""
        self.thw, self._layers, self._left = thw, layers, 0
        self._tables: tuple[object, Tensor, Tensor] | None = None

    def tables(self, rotary: Rotary, back: bool = False) -> tuple[Tensor, Tensor]:
        """Cosines and sines of `rotary` for these tokens, or what undoes them: float32 `[T, P]` each."""
        key = *rotary.key, back
        if self._tables is None or self._tables[0] != key:
            tables = rotary.tables(self.thw)
            self._tables, self._left = (key, *(rotary.back(*tables) if back else tables)), self._layers
        _, cosines, sines = self._tables
        self._left -= 1
        if self._left <= 0:
            self._tables = None
        return cosines, sines
