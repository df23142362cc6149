"""`Turn`: what one call gives the model, computed from the conversation so far and what its cache holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from capsight.errors import LayoutError, OptionError
from capsight.kvcapsule import CapsuleCache
from capsight.kvcapsule.cache.conversation import Conversation
from capsight.kvcapsule.cache.stock import has_states
from capsight.layout import PromptLayout, build_layout
from capsight.layout.pixels import select_images
from capsight.layout.positions import position_ids, text_position_ids
from capsight.runtime.split import PIXEL_PREFIXES, has_vision, sequence_length, tokens_after


@dataclass(frozen=True, slots=True)
class Turn:
    """One call of a model.

    Attributes:
        inputs: for `model.generate`: all tokens, the pixels of images that the cache does not hold, options.
        layout: of everything so far, one row for each of the inputs; None where it cannot be known.
        conversation: what the cache will have read, one row for each of the cache.
        seen: tokens per row that the cache holds.
    """

    inputs: dict[str, Any]
    layout: PromptLayout | None
    conversation: Conversation | None
    seen: int

    @property
    def rows(self) -> int:
        """Prompts, before `generate` repeats them."""
        return len(self.inputs["input_ids"])

    @classmethod
    def first(cls, inputs: Mapping[str, Any], config: Any, strict: bool) -> Turn:
        """The call that fills an empty cache.

        Args:
            inputs: processor outputs and options.
            config: the model's config.
            strict: whether the layout has to be known.

        Raises:
            LayoutError: it has to, and is not.
        """
        try:
            layout = build_layout(inputs, config)
        except LayoutError:
            if strict:
                raise
            return cls(dict(inputs), None, None, 0)
        return cls._of(inputs, layout, Conversation.of(inputs, layout), 0, config)

    @classmethod
    def next(cls, cache: Any, inputs: Mapping[str, Any], config: Any) -> Turn:
        """A call that goes on from a filled cache.

        Raises:
            LayoutError: the inputs do not continue what the cache has read.
            OptionError: they are no longer than it, or bring images without pixels.
        """
        seen, length = cache.get_seq_length(), sequence_length(inputs)
        if length <= seen:
            raise OptionError(
                f"the cache holds {seen} tokens and the prompt has {length}; pass the whole "
                "conversation, with the new turn at its end"
            )
        _check_padding(cache, inputs, seen)
        rows = len(inputs["input_ids"])
        known: Conversation | None = getattr(cache, "conversation", None)
        if known is not None and not isinstance(cache, CapsuleCache):  # whose rows nobody follows
            known = known.repeated(rows) if rows % known.layout.batch_size == 0 else None
        if known is not None:
            known.check(inputs, seen)
            known = known.moved(range(0, known.layout.batch_size, known.layout.batch_size // rows))
        pictured = any(inputs.get(name) is not None for name in ("pixel_values", "pixel_values_videos"))
        whole = build_layout(inputs, config) if pictured else None
        if whole is not None and known is not None:
            known.check_images(inputs, whole)
        entries = {k: v for k, v in inputs.items() if not k.startswith(PIXEL_PREFIXES)}
        if has_vision(tokens_after(inputs, seen), config):
            if whole is None:
                raise OptionError(
                    "the new turn has image tokens, but no pixels were passed; pass the processor's outputs "
                    "for the whole conversation"
                )
            entries |= select_images(inputs, whole, _since(whole, seen))
            layout: PromptLayout | None = whole
        else:
            before = _layout(cache, known, rows)
            layout = whole if before is None else before.continued(seen, length)
            if layout is not None and inputs.get("attention_mask") is not None:
                positions = text_position_ids(layout, config, inputs["attention_mask"])
                entries |= (
                    {} if positions is None or "position_ids" in inputs else {"position_ids": positions}
                )
        if layout is None:
            return cls(entries, None, None, seen)
        return cls._of(entries, layout, Conversation.of(inputs, layout, known), seen, config)

    @classmethod
    def _of(
        cls, inputs: Mapping[str, Any], layout: PromptLayout, read: Conversation, seen: int, config: Any
    ) -> Turn:
        entries = dict(inputs)
        given_positions = entries.get("position_ids")
        positions = position_ids(layout, config) if given_positions is None else given_positions
        if positions is not None:
            entries["position_ids"] = positions.to(entries["input_ids"].device)
        return cls(entries, layout, read, seen)


def _check_padding(cache: Any, inputs: Mapping[str, Any], seen: int) -> None:
    """Attention is told to pass over padding; states cannot be."""
    mask = inputs.get("attention_mask")
    if mask is None or mask.ndim != 2 or not any(map(has_states, cache.layers)):
        return
    begun = mask.cumsum(-1) > 0  # what stands before a row's first token changes no state
    if (begun & (mask == 0))[:, seen:].any():
        raise LayoutError(
            "the new turn is padded, and the states of this model's layers (linear attention, convolutions) "
            "would run through the padding; ask rows of one length together, others over a copy of the cache"
        )


def _layout(cache: Any, known: Conversation | None, rows: int) -> PromptLayout | None:
    if known is not None:
        return known.layout
    if not isinstance(cache, CapsuleCache):
        return None
    held = cache.layout
    return held.select(range(0, held.batch_size, max(held.batch_size // rows, 1)))


def _since(layout: PromptLayout, seen: int) -> set[tuple[int, int]]:
    """The images that begin after the first `seen` tokens.

    Raises:
        LayoutError: an image lies on both sides.
    """
    images: dict[tuple[int, int], set[bool]] = {}
    for index, row in enumerate(layout.rows):
        for block in row.blocks:
            images.setdefault((index, block.image), set()).add(block.start >= seen)
    if any(len(sides) > 1 for sides in images.values()):
        raise LayoutError(f"the cache ends at {seen}, inside an image of the conversation; prefill it again")
    return {key for key, sides in images.items() if sides == {True}}
