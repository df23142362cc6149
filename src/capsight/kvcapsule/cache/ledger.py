"""`Ledger`: what the layers of one cache share - plan, placement of stored tokens, scratch buffer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from capsight.errors import LayoutError
from capsight.kvcapsule.attention.latents import LatentTokens
from capsight.kvcapsule.cache.buffers import Scratch
from capsight.kvcapsule.cache.exact_rows import ExactRows
from capsight.kvcapsule.cache.layer_tokens import LayerTokens
from capsight.kvcapsule.cache.placement import Placement
from capsight.kvcapsule.cache.waiting import EncodeQueue
from capsight.kvcapsule.codecs import BlockCodec, TokenPositions
from capsight.kvcapsule.codecs.rotary import check_reach
from capsight.kvcapsule.plan import CapsulePlan, Run
from capsight.layout import PromptLayout
from capsight.layout.positions import rope_positions


class Ledger:
    """Shared state of a `CapsuleCache`: integers, index tensors, the scratch, and blocks that wait.

    Attributes:
        plan: the capsule runs of the batch as it is now.
        scratch: the buffer that layers rebuild into.
        queue: blocks of the last prefill that are not encoded yet.
        latent: whether layers leave capsules to an attention function that reads them as they are.
        left: what the last update left to it, until it is taken.
    """

    def __init__(self, layout: PromptLayout, codecs: Sequence[BlockCodec], config: PreTrainedConfig) -> None:
        """Plan `layout` in runs of the block size of `codecs`, which are those of all layers."""
        self._given, self._config = layout, config
        self._layout = layout
        self._block_size = block_size = codecs[0].block_size
        self._last: Placement | None = None
        self._complete: tuple[int, tuple[Run, ...]] = (-1, ())
        self.plan = CapsulePlan.from_layout(layout, block_size)
        self.scratch = Scratch()
        self.queue = EncodeQueue(codecs)
        self.latent = False
        self.left: tuple[LayerTokens, int] | None = None  # and tokens of its tail
        self._exact: tuple[Placement, ExactRows] | None = None
        self._intake: tuple[Placement | None, Intake] | None = None
        self._latents: tuple[Placement, LatentTokens] | None = None
        self._rotary: Any = getattr(codecs[0], "rotary", None)
        self._sharing = codecs[0].sharing
        self._positions: tuple[tuple[Run, ...], TokenPositions] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Without what is computed anew, and what only lives in this process."""
        return self.__dict__ | {"scratch": Scratch(), "left": None, "_exact": None, "_latents": None}

    @property
    def layout(self) -> PromptLayout:
        """The layout of the batch as it is now (after beams repeated or reordered its rows)."""
        return self._layout

    def fit_batch(self, batch_size: int) -> None:
        """Repeat the rows for a batch that `generate` expanded (beams, several sequences).

        Raises:
            LayoutError: the batch is not a multiple of the layout's rows.
        """
        rows = self.plan.batch_size
        if batch_size % rows:
            raise LayoutError(
                f"the model was given a batch of {batch_size}, the cache a layout of {rows} rows; "
                "make the cache from the same inputs"
            )
        self._set_layout(self._layout.repeat(batch_size // rows))

    def extend(self, layout: PromptLayout, stored: Sequence[Run], seen: int) -> None:
        """Take the layout of the whole conversation so far, with the images of a new turn.

        Args:
            layout: rows as in the batch, or before `generate` expanded it.
            stored: runs that are capsules already.
            seen: tokens per row that the cache holds.

        Raises:
            LayoutError: it does not continue the layout in use.
        """
        rows = self.plan.batch_size
        if seen and rows % len(layout.rows):
            raise LayoutError(f"the conversation has {rows} rows, the new layout {len(layout.rows)}")
        longer = layout.repeat(rows // len(layout.rows)) if seen else layout
        plan = CapsulePlan.from_layout(longer, self._block_size)
        if not set(stored) <= set(plan.complete(seen)) or (seen and plan.pads != self.plan.pads):
            raise LayoutError(
                "the new layout does not continue the one in the cache: its earlier images or its padding "
                "differ; build it from the whole conversation, padded as before"
            )
        self._given = layout
        self._set_layout(longer)

    def move_rows(self, rows: Sequence[int]) -> None:
        """Make row i of the batch what row `rows[i]` was."""
        self._set_layout(self._layout.select(rows))

    def restart(self) -> None:
        """Go back to the layout as it was given, for a new prefill of the same prompt."""
        self.queue.clear()
        self._set_layout(self._given)

    def complete(self, seen: int) -> tuple[Run, ...]:
        """The runs wholly inside the first `seen` tokens; computed once for all layers."""
        if self._complete[0] != seen:
            self._complete = (seen, self.plan.complete(seen))
        return self._complete[1]

    def place(self, runs: tuple[Run, ...], settled: int, device: torch.device) -> Placement:
        """The placement of `runs` in `settled` tokens; built once for all layers of a forward pass."""
        last = self._last
        if last is None or (last.settled, last.runs, last.run_rows.device) != (settled, runs, device):
            last = Placement.build(runs, self.plan.pads, self._block_size, settled, device)
            self._last = last
        return last

    def intake(self, stored: Placement | None, length: int, device: torch.device) -> Intake:
        """What becomes of rows of `length` tokens; computed once for all layers that hold `stored`."""
        placement, last = self.place(self.complete(length), length, device), self._intake
        if last is None or last[0] is not stored or last[1].placement is not placement:
            last = stored, Intake.build(placement, () if stored is None else stored.runs)
            if last[1].runs and self._rotary is not None:
                check_reach(self._config, rope_positions(self._layout, self._config)[..., :length])
            self._intake = last
        return last[1]

    def positions(self, runs: tuple[Run, ...], device: torch.device) -> TokenPositions:
        """Positions of the tokens of `runs`; computed once for all layers, and as long as runs stay."""
        known = self._positions
        if known is None or known[0] != runs or known[1].thw.device != device:
            places = rope_positions(self._layout, self._config)  # [3, B, S]
            thw = torch.cat([places[:, run.row, run.start : run.end] for run in runs], 1)
            known = self._positions = runs, TokenPositions(thw.to(device), self._sharing)
        return known[1]

    def latent_tokens(self, placement: Placement) -> LatentTokens:
        """Places of the tokens of `placement`'s runs, row after row; computed once for all layers."""
        if self._latents is None or self._latents[0] is not placement:
            counts = torch.zeros(self.plan.batch_size, dtype=torch.int64)
            for run in placement.runs:
                counts[run.row] += run.length
            thw = self.positions(placement.runs, placement.run_rows.device).thw
            tokens = LatentTokens(counts.cumsum(0) - counts, counts, thw, self._rotary)
            self._latents = placement, tokens
        return self._latents[1]

    def exact_rows(self, placement: Placement) -> ExactRows:
        """The exact tokens of `placement` side by side; computed once for all layers."""
        if self._exact is None or self._exact[0] is not placement:
            self._exact = placement, ExactRows.build(placement)
        return self._exact[1]

    def _set_layout(self, layout: PromptLayout) -> None:
        self._layout, self._last, self._exact, self._intake, self._positions = layout, None, None, None, None
        self._complete = (-1, ())
        self.plan = CapsulePlan.from_layout(layout, self._block_size)

    def full(self, role: str, length: int, like: Tensor) -> Tensor:
        """Scratch `[B, length, H, D]` for keys or values, like `[B, H, Q, D]`; padding is set to zero."""
        batch, heads, _, head_dim = like.shape
        full = self.scratch.view(role, (batch, length, heads, head_dim), like)
        for row, pad in enumerate(self.plan.pads):
            full[row, :pad] = 0
        return full


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
