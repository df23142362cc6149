"""`JointPayload`: latents that all layers share, and the form that they are read in during a pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor

from capsight.kvcapsule.codecs.block import Payload


@dataclass(slots=True, eq=False)
class OpenLatents:
    """Latents `[T, R]` in a form to calculate with, and how many layers have yet to read them."""

    latents: Tensor
    left: int


class JointPayload(Payload):
    """Latents of T tokens; the same object in every layer.

    Tensors:
        codes: uint8 `[T, C]`.
        scales: float16 `[T, R / GROUP]`.
    """

    open: OpenLatents | None = None
    _selected: tuple[Tensor, Any] | None = None
    _joined: tuple[Payload, Any] | None = None

    def select(self, index: Tensor) -> Self:
        """The tokens at `index`: the same object for the same index, so that layers go on sharing."""
        if self._selected is None or self._selected[0] is not index:
            device = next(iter(self.tensors.values())).device  # of the first layer; others may lie elsewhere
            self._selected = index, Payload.select(self, index.to(device))
        return self._selected[1]

    def join(self, other: Payload) -> Self:
        """These tokens, then the other ones; shared likewise."""
        if self._joined is None or self._joined[0] is not other:
            self._joined = other, Payload.join(self, other)
        return self._joined[1]
