"""`Conversation`: what a cache has read; it lies on the cache and goes where the cache goes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from capsight.errors import LayoutError
from capsight.kvcapsule.fingerprint import pixels_fingerprint
from capsight.layout import PromptLayout
from capsight.layout.pixels import pixels_of


@dataclass(frozen=True, slots=True, eq=False)
class Conversation:
    """The tokens and images that the rows of a cache were made from.

    Attributes:
        layout: of the prompt.
        input_ids: int64 `[B, K]` on the CPU, padding included: the prompt, and the tokens generated since
            as far as they are known.
        prompt: how many of the K are the prompt.
        images: for each row, a fingerprint of each of its images; "" where its pixels were not given.
        branched: whether rows have gone on with tokens that nobody knows, as beams do.
    """

    layout: PromptLayout
    input_ids: Tensor
    prompt: int
    images: tuple[tuple[str, ...], ...]
    branched: bool = False

    @classmethod
    def of(
        cls, inputs: Mapping[str, Any], layout: PromptLayout, before: Conversation | None = None
    ) -> Conversation:
        """The conversation of processor outputs.

        Args:
            inputs: of everything so far; pixels may be missing.
            layout: of everything so far.
            before: what the cache had read; its images are known already.

        Raises:
            LayoutError: the pixels are not those of the layout.
        """
        ids = inputs["input_ids"].detach().to("cpu", torch.int64)
        known = before.images if before else ((),) * layout.batch_size
        images = tuple(
            tuple(a or b for a, b in zip_longest(old, new, fillvalue=""))
            for old, new in zip(known, _fingerprints(inputs, layout), strict=True)
        )
        return cls(layout, ids, ids.shape[1], images)

    def moved(self, rows: Sequence[int]) -> Conversation:
        """Of a cache whose row i is now what row `rows[i]` was."""
        images = tuple(self.images[row] for row in rows)
        return replace(
            self, layout=self.layout.select(rows), input_ids=self.input_ids[list(rows)], images=images
        )

    def repeated(self, batch_size: int) -> Conversation:
        """Of a cache whose rows have been repeated to `batch_size`.

        Raises:
            LayoutError: that is no multiple of the rows.
        """
        rows = self.layout.batch_size
        if batch_size % rows:
            raise LayoutError(f"the cache holds {rows} rows, the prompts are {batch_size}")
        return self.moved([row for row in range(rows) for _ in range(batch_size // rows)])

    def answered(self, sequences: Tensor | None) -> Conversation:
        """With the tokens generated since: int64 `[B, K + new]`, the prompt included; None: beams of them."""
        if sequences is None or len(sequences) != self.layout.batch_size:
            return replace(self, branched=True)
        return replace(self, input_ids=sequences.detach().to("cpu", torch.int64))

    def check(self, inputs: Mapping[str, Any], seen: int) -> None:
        """Refuse inputs that do not start with what was read.

        Args:
            inputs: processor outputs of the whole conversation, one row for each or for each n of the
                cache in turn; pixels may be missing.
            seen: tokens per row that the cache holds.

        Raises:
            LayoutError: their first tokens or their images are others.
        """
        ids: Tensor = inputs["input_ids"]
        rows = self.layout.batch_size
        if rows % len(ids):
            raise LayoutError(f"the cache holds {rows} rows, the prompts are {len(ids)}")
        copies = rows // len(ids)
        ids = ids.cpu().repeat_interleave(copies, 0)  # as `generate` will
        known = self.input_ids[:, :seen]
        if self.branched and seen > known.shape[1]:
            raise LayoutError(
                f"the cache went on with beams, and its rows are not the answers; crop it to "
                f"{known.shape[1]} tokens, the prompt, or make a new one"
            )
        wrong = (ids[:, : known.shape[1]] != known).nonzero()
        if len(wrong):
            row, at = wrong[0].tolist()
            raise LayoutError(
                f"the cache was made from another prompt: token {at} of row {row} is {int(ids[row, at])}, "
                f"in the cache it is {int(known[row, at])}; pass the same conversation with the new turn at "
                "its end, or make a new cache"
            )

    def check_images(self, inputs: Mapping[str, Any], layout: PromptLayout) -> None:
        """Refuse inputs whose images are not those that were read.

        Args:
            inputs: processor outputs of the whole conversation, pixels included.
            layout: the layout made of them.

        Raises:
            LayoutError: they are others.
        """
        each = self.layout.batch_size // layout.batch_size
        for row, given in enumerate(_fingerprints(inputs, layout)):
            known = self.images[row * each]
            if any(a and b and a != b for a, b in zip(given, known, strict=False)):
                raise LayoutError(
                    "the cache was made from other images; make a new cache for these, or leave the pixels "
                    "out to ask about those in the cache"
                )


def _fingerprints(inputs: Mapping[str, Any], layout: PromptLayout) -> list[tuple[str, ...]]:
    """A fingerprint for each image of each row; "" without pixels."""
    kinds = [{block.image: block.kind for block in row.blocks} for row in layout.rows]
    given = {
        "image": inputs.get("pixel_values") is not None,
        "video": inputs.get("pixel_values_videos") is not None,
    }
    return [
        tuple(
            pixels_fingerprint(pixels_of(inputs, layout, (row, image))) if given[kind] else ""
            for image, kind in images.items()
        )
        for row, images in enumerate(kinds)
    ]
