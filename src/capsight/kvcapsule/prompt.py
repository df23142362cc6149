"""`Prompt`: what a cache has read, so that nobody goes on with it after another prompt by mistake."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from capsight.errors import LayoutError
from capsight.kvcapsule.cache.row_order import RowOrder
from capsight.kvcapsule.fingerprint import pixels_fingerprint


@dataclass(frozen=True, slots=True, eq=False)
class Prompt:
    """The prompt that a cache was prefilled with.

    Attributes:
        input_ids: int64 `[B, K]` on the CPU, padding included; tokens generated since are not in it.
        pixels: fingerprint of its pixels, "" if there are none.
    """

    input_ids: Tensor
    pixels: str

    @classmethod
    def of(cls, inputs: Mapping[str, Any], before: Prompt | None = None) -> Prompt:
        """The prompt of processor outputs; a text turn after `before` keeps its images."""
        ids, pixels = inputs["input_ids"].detach().cpu(), pixels_fingerprint(inputs)
        known = before.repeated(len(ids)) if before else None
        return cls(ids, pixels or (known.pixels if known else ""))

    def repeated(self, batch_size: int) -> Prompt | None:
        """The prompt of a cache whose rows were repeated to `batch_size`; None if they were not."""
        repeats, rest = divmod(batch_size, len(self.input_ids))
        if rest:
            return None
        return Prompt(self.input_ids.repeat_interleave(repeats, 0), self.pixels if repeats == 1 else "")

    def following(self, order: RowOrder) -> Prompt:
        """The prompt of a cache whose rows have moved since it was read."""
        return self if order.unmoved else Prompt(order.pick(self.input_ids), "")

    def check(self, inputs: Mapping[str, Any], seen: int) -> None:
        """Refuse inputs that do not start with this prompt.

        Args:
            inputs: processor outputs of the whole conversation; pixels may be missing.
            seen: tokens per row that the cache holds.

        Raises:
            LayoutError: their first tokens or their images are others.
        """
        ids: Tensor = inputs["input_ids"]
        ids = ids.repeat_interleave(max(len(self.input_ids) // len(ids), 1), 0)  # as `generate` will
        known = self.repeated(len(ids))
        if known is None:
            return
        own = known.input_ids[:, :seen]
        wrong = (ids[:, : own.shape[1]].cpu() != own).nonzero()
        if len(wrong):
            row, at = wrong[0].tolist()
            raise LayoutError(
                f"the cache was made from another prompt: token {at} of row {row} is {int(ids[row, at])}, "
                f"in the cache it is {int(own[row, at])}; pass the same conversation with the new turn at "
                "its end, or make a new cache"
            )
        if known.pixels and pixels_fingerprint(inputs) not in ("", known.pixels):
            raise LayoutError(
                "the cache was made from other images; make a new cache for these, or leave the pixels out "
                "to ask about those in the cache"
            )
