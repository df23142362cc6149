"""`CapsuleCache`: a transformers `Cache` that keeps vision keys and values as capsules."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar
from weakref import WeakSet

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import DynamicCache, DynamicLayer

from capsight.errors import CapsightError, ModelMismatchError
from capsight.kvcapsule.cache.counted import CountedCache
from capsight.kvcapsule.cache.layer import CapsuleLayer
from capsight.kvcapsule.cache.ledger import Ledger
from capsight.kvcapsule.cache.row_order import RowOrder
from capsight.kvcapsule.cache.stock import StateCopy, cannot_crop, move_rows
from capsight.kvcapsule.codecs import BlockCodec
from capsight.layout import PromptLayout


class CapsuleCache(CountedCache):
    """Hand it to `model.generate(**inputs, past_key_values=cache)`; nothing of the model is patched.

    Prefill sees full keys and values; what comes later attends to capsules of the images, which
    each layer rebuilds into one shared scratch buffer (`materialise`), or leaves to an attention
    function that reads them as they are (`latent`). Text, delimiters, block tails and generated
    tokens are exact. Sliding-window layers are stock transformers layers.
    The capsule scheme is that of KVCapsule (arXiv 2605.16439); codecs and storage are our own.

    Attributes:
        honours_key_bias: to be set by whoever runs an attention function that adds `key_bias`;
            without it a codec that rebuilds nothing is refused.
    """

    _layer_class: ClassVar[type[CapsuleLayer]] = CapsuleLayer

    def __init__(
        self, codecs: Mapping[int, BlockCodec], layout: PromptLayout, config: PreTrainedConfig
    ) -> None:
        """Make an empty cache for one batch of prompts.

        Args:
            codecs: codec of every full-attention layer, by layer index; all of one block size.
            layout: where the images lie in the prompt.
            config: the model's config.

        Raises:
            ModelMismatchError: the codecs are not those of the full-attention layers of `config`.
        """
        full = full_attention_layers(config)
        if full != sorted(codecs):
            raise ModelMismatchError(
                f"the capsule has codecs for layers {sorted(codecs)}, the model has full attention in layers "
                f"{full}; fit a capsule for this model"
            )
        self._config = config
        self._ledger = Ledger(layout, list(codecs.values()), config)
        self._leaves_from: int | None = None  # tokens held from which on capsules may be left to attention
        self._orders: WeakSet[RowOrder] = WeakSet()
        self._states: StateCopy | None = None
        self.honours_key_bias = False
        layers = DynamicCache(config=config).layers
        for index, codec in codecs.items():
            layers[index] = self._layer_class(codec, self._ledger)
        super().__init__(layers=layers)

    @property
    def layout(self) -> PromptLayout:
        """The layout of the batch as it is now."""
        return self._ledger.layout

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Add `[B, H, Q, D]` new tokens of one layer; returns `[B, H, S, D]`, see `CapsuleLayer`.

        Raises:
            LayoutError: the batch does not fit the layout.
            CapsightError: the codec rebuilds nothing and attention does not hide what is missing.
        """
        layer, batch = self.layers[layer_idx], key_states.shape[0]
        if isinstance(layer, CapsuleLayer):
            if self._ledger.plan.batch_size != batch:
                if layer.get_seq_length():
                    rows = self._ledger.plan.batch_size
                    raise CapsightError(f"the cache holds {rows} rows, the model was given {batch}")
                self._ledger.fit_batch(batch)
            if self._ledger.left is not None:
                raise CapsightError(
                    "attention did not read the capsules it was left; use decode='materialise' instead"
                )
            held = layer.get_seq_length()
            self._ledger.latent = self._leaves_from is not None and held >= self._leaves_from
            payload = layer.payload
            if not self.honours_key_bias and payload is not None and layer.codec.bias(payload) is not None:
                raise CapsightError(
                    f"the {layer.codec.name} codec needs an attention function that hides evicted tokens; "
                    "generate inside capsight.enable(model, capsule=...)"
                )
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def key_bias(self, layer_idx: int) -> Tensor | None:
        """What attention has to add to its scores over the keys that `update` last returned for a layer.

        Returns:
            `[B, H or 1, 1, S]` in the keys' dtype (H the KV heads), `finfo.min` for evicted keys; None
            where there is nothing to add, as always with codecs that rebuild.
        """
        layer = self.layers[layer_idx]
        return layer.key_bias() if isinstance(layer, CapsuleLayer) else None

    @contextmanager
    def leaving_capsules(self, after: int = 0) -> Iterator[None]:
        """Inside the block, `update` may leave capsules to an attention function that calls `take_latent`.

        Args:
            after: tokens per row that the cache has to hold before it does.
        """
        self._leaves_from = after
        try:
            yield
        finally:
            self._leaves_from = self._ledger.left = None

    def take_latent(self) -> Callable[[Tensor, Tensor | None, float], Tensor] | None:
        """Attention over all that the last update left to it; None if `update` returned all tokens.

        Returns:
            A function of queries `[B, Hq, Q, D]`, a mask over all tokens (see `LayerTokens.attend`) and the
            factor of scores, which gives `[B, Q, Hq, D]`.
        """
        left, self._ledger.left = self._ledger.left, None
        if left is None:
            return None
        tokens, held = left
        return lambda query, mask, scaling: tokens.attend(query, held, mask, scaling, self._ledger.scratch)

    def extend_layout(self, layout: PromptLayout) -> None:
        """Announce the images of a further turn, before it is prefilled.

        Args:
            layout: layout of the whole conversation so far, the new turn included.

        Raises:
            LayoutError: it does not continue the layout in use.
        """
        placement = next((layer.placement for layer in self.capsule_layers.values()), None)
        self._ledger.extend(layout, () if placement is None else placement.runs, self.get_seq_length())

    def follow_rows(self) -> RowOrder:
        """An order that tells, as long as somebody holds it, where the rows of now have gone."""
        order = RowOrder(self._ledger.plan.batch_size)
        self._orders.add(order)
        return order

    def reset(self) -> None:
        """Empty the cache, for another prefill of the same prompt."""
        self._ledger.restart()
        self._states = None
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
            kept = "none were" if self._states is None else f"those of {self._states.length} tokens were"
            raise CapsightError(
                f"cannot crop to {length - drop} tokens: states and full sliding windows go back only "
                f"to a length whose states were kept, as `encapsulate` does, and {kept}"
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

    def _move_rows(self, rows: Sequence[int]) -> None:
        self._ledger.move_rows(rows)
        for order in self._orders:
            order.move(rows)
        if self._states is not None:
            self._states.move_rows(torch.tensor(rows))
        moved: dict[int, tuple[Any, ...]] = {}  # layers share their placement, so each is worked out once
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


def full_attention_layers(config: PreTrainedConfig) -> list[int]:
    """Indices of a model's full-attention layers: those whose vision tokens can be compressed."""
    layers = DynamicCache(config=config).layers
    return [index for index, layer in enumerate(layers) if type(layer) is DynamicLayer]
