"""`LayeredCache`: the layers of a cache of capsules, their rows, lengths and bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import DynamicCache, DynamicSlidingWindowLayer

from capsight.errors import CapsightError, ModelMismatchError
from capsight.kvcapsule.cache.conversation import Conversation
from capsight.kvcapsule.cache.counted import CountedCache
from capsight.kvcapsule.cache.layer import CapsuleLayer
from capsight.kvcapsule.cache.ledger import Ledger
from capsight.kvcapsule.cache.stock import (
    StateCopy,
    cannot_crop,
    full_attention_layers,
    has_states,
    move_rows,
)
from capsight.kvcapsule.codecs import BlockCodec
from capsight.layout import PromptLayout


class LayeredCache(CountedCache):
    """Capsules in the full-attention layers of a model, exact windows in the others.

    Attributes:
        conversation: the prompt that was read, with its images; None where nobody has said.
    """

    conversation: Conversation | None = None
    _layer_class: ClassVar[type[CapsuleLayer]] = CapsuleLayer

    def __init__(
        self, codecs: Mapping[int, BlockCodec], layout: PromptLayout, config: PreTrainedConfig
    ) -> None:
        """Make an empty cache, see `CapsuleCache`."""
        full = full_attention_layers(config)
        if full != sorted(codecs):
            raise ModelMismatchError(
                f"the capsule has codecs for layers {sorted(codecs)}, the model has full attention in layers "
                f"{full}; fit a capsule for this model"
            )
        self._config = config
        self._states: StateCopy | None = None
        self._ledger = Ledger(layout, list(codecs.values()), config)
        self._open = False  # whether a step has begun and not reached the last layer
        self._finite: list[tuple[int, Tensor]] = []  # sums of what the last prefill brought, by layer
        layers: list[Any] = DynamicCache(config=config).layers
        for index, codec in codecs.items():
            layers[index] = self._layer_class(codec, self._ledger)
        super().__init__(layers=layers)
        self._last = max(layers.index(layer) for layer in self._holding())

    @property
    def layout(self) -> PromptLayout:
        """The layout of the batch as it is now."""
        return self._ledger.layout

    def continue_layout(self, layout: PromptLayout) -> None:
        """Announce what is read next: the first turn, whatever the cache was made for, or a further one."""
        if not self.get_seq_length():
            if layout != self._ledger.layout:
                self.extend_layout(layout)
        elif (
            layout.vision_tokens * self._ledger.plan.batch_size
            != self.layout.vision_tokens * layout.batch_size
        ):
            self.extend_layout(layout)

    def extend_layout(self, layout: PromptLayout) -> None:
        """Announce the images of a further turn, before it is prefilled.

        Args:
            layout: layout of the whole conversation so far, the new turn included.

        Raises:
            LayoutError: it does not continue the layout in use.
        """
        placement = next((layer.placement for layer in self.capsule_layers.values()), None)
        self._ledger.extend(layout, () if placement is None else placement.runs, self.get_seq_length())

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Logical length: tokens seen per row, padding included."""
        self._mend()
        return int(super().get_seq_length(layer_idx))

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Length and offset of the keys that the next update of a layer returns."""
        self._mend()
        sizes: tuple[int, int] = super().get_mask_sizes(query_length, layer_idx)
        return sizes

    def _mend(self) -> None:
        """Forget the tokens of a step that was broken off between two layers."""
        if self._open:
            self._open = False
            self.restore(min(layer.get_seq_length() for layer in self.capsule_layers.values()))

    def restore(self, length: int) -> None:
        """Go back to `length` tokens per row after a turn that was broken off.

        Where that cannot be, the cache is emptied; it then takes the whole prompt again.
        """
        self._open, self._ledger.left, self._finite = False, None, []
        back = self._states if self.kept_states == length else None
        longer = [layer for layer in self._holding() if layer.get_seq_length() > length]
        stuck = back is None and (any(map(cannot_crop, longer)) or any(map(has_states, self.layers)))
        try:
            for layer in self.capsule_layers.values():
                layer.check_crop(layer.get_seq_length() - length)
        except CapsightError:
            stuck = True
        if stuck or not length:
            self.reset()
            return
        for layer in longer:
            if isinstance(layer, CapsuleLayer) or back is None:
                layer.crop(length - layer.get_seq_length())
        if back is not None:
            back.put_back(self.layers)

    def check_finite(self) -> None:
        """Refuse to go on with numbers that are none.

        Raises:
            CapsightError: the last prefill gave NaN or infinite keys or values.
        """
        found, self._finite = self._finite, []
        if not found:
            return
        fine = torch.stack([total.to(found[0][1].device) for _, total in found]).isfinite()
        if not fine.all():
            wrong, _ = found[int(fine.int().argmin())]
            raise CapsightError(
                f"layer {wrong} gives NaN or infinite keys or values; pixels, weights or dtype "
                "are at fault (float16 overflows where bfloat16 does not)"
            )

    def _holding(self) -> list[Any]:
        """The layers that hold keys and values."""
        layers: list[Any] = self.layers
        return [layer for layer in layers if isinstance(layer, CapsuleLayer | DynamicSlidingWindowLayer)]

    def reset(self) -> None:
        """Empty the cache, for another prefill of the same prompt."""
        self._ledger.restart()
        self._open, self._finite, self._states = False, [], None
        for index, layer in enumerate(DynamicCache(config=self._config).layers):
            if isinstance(self.layers[index], CapsuleLayer):
                self.layers[index].reset()
            else:
                self.layers[index] = layer

    def keep_states(self) -> None:
        """Remember the length of now as one that `crop` can come back to in spite of states and windows.

        Only models with linear attention, convolutions or sliding windows need it; states are copied.
        """
        if any(not isinstance(layer, CapsuleLayer) for layer in self.layers):
            self._states = StateCopy(self.layers, self.get_seq_length())

    @property
    def kept_states(self) -> int | None:
        """The length that `keep_states` was last called at, if the model needs it."""
        return None if self._states is None else self._states.length

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens: as many as a negative number says, or down to a positive length.

        Raises:
            CapsightError: that would cut a capsule, or a layer has a recurrent state or a full window and the
                length is not that of `keep_states`; nothing has been removed then.
        """
        length = self.get_seq_length()
        drop = max(length - tokens_to_remove, 0) if tokens_to_remove > 0 else -tokens_to_remove
        for capsule_layer in self.capsule_layers.values():
            capsule_layer.check_crop(drop)
        back = self._states if drop and self.kept_states == length - drop else None
        if drop and back is None and any(map(cannot_crop, self.layers)):
            copied = "none were" if self._states is None else f"those of {self._states.length} tokens were"
            raise CapsightError(
                f"cannot crop to {length - drop} tokens: states and full sliding windows go back only "
                f"to a length whose states were kept, as `encapsulate` does, and {copied}"
            )
        layers: list[Any] = list(self.layers)
        for layer in layers:
            by_itself = isinstance(layer, CapsuleLayer) or (back is None and not cannot_crop(layer))
            if by_itself and layer.is_initialized:
                layer.crop(-drop)
        if back is not None:
            back.put_back(layers)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Make row i of the batch what row `beam_idx[i]` was (int64 `[B]`)."""
        self._move_rows(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times in place."""
        self._move_rows([row for row in range(self._ledger.plan.batch_size) for _ in range(repeats)])

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows that `indices` (int64 `[B']`, or bool `[B]`) names."""
        self._move_rows(torch.arange(self._ledger.plan.batch_size)[indices.cpu()].tolist())

    def _fit_batch(self, batch: int) -> None:
        """Repeat the rows for a batch that `generate` expanded (beams, several sequences).

        Raises:
            LayoutError: the batch is no multiple of the rows of a prompt that is to be read.
            CapsightError: it is no multiple of the rows held.
        """
        rows = self._ledger.plan.batch_size
        if batch == rows:
            return
        if not self.get_seq_length():
            self._ledger.fit_batch(batch)
            if self.conversation is not None:
                self.conversation = self.conversation.repeated(batch)
            return
        if batch % rows:
            raise CapsightError(f"the cache holds {rows} rows, the model was given {batch}")
        self.batch_repeat_interleave(batch // rows)

    def _move_rows(self, rows: Sequence[int]) -> None:
        self._ledger.move_rows(rows)
        if self.conversation is not None:
            self.conversation = self.conversation.moved(rows)
        if self._states is not None:
            self._states.move_rows(torch.tensor(rows))
        moved: dict[int, tuple[Any, ...]] = {}  # layers share their placement, so each is computed once
        layers: list[Any] = self.layers
        for layer in layers:
            if not isinstance(layer, CapsuleLayer):
                move_rows(layer, torch.tensor(rows))
            elif layer.placement is not None:
                old = layer.placement
                index = torch.tensor(rows, device=old.run_rows.device)
                if id(old) not in moved:
                    moved[id(old)] = (old, *old.select(rows))
                layer.move_rows(index, *moved[id(old)][1:])
