"""Runs the text part of a model over the same prompts under one head map after the other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from capsight.blindsight.calibrate.capture import following, shape_of, watching
from capsight.blindsight.head_map import HeadMap
from capsight.layout import PromptLayout


class TextPart:
    """What a model hands to its text part for a batch of prompts; the vision tower runs once, here."""

    def __init__(self, model: Any, inputs: Mapping[str, Any], layout: PromptLayout) -> None:
        """Run the dense model once and note the arguments of its text part.

        Args:
            model: a transformers vision-language model.
            inputs: processor outputs.
            layout: theirs.
        """
        self._model, self._layout = model, layout
        self._given: dict[str, Any] = {}
        hook = model.get_decoder().register_forward_pre_hook(self._note, with_kwargs=True)
        try:
            with watching(model, following(layout, HeadMap.all_dense(*shape_of(model)))):
                model(**inputs, use_cache=False, logits_to_keep=1)
        finally:
            hook.remove()

    def _note(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        self._given = dict(kwargs)

    def log_probabilities(self, head_map: HeadMap, last: int) -> Tensor:
        """Log-probabilities of the next token at the last positions.

        Args:
            head_map: what attention follows.
            last: how many positions.

        Returns:
            float32 `[B, last, V]`.
        """
        with watching(self._model, following(self._layout, head_map)):
            hidden = self._model.get_decoder()(**self._given).last_hidden_state
            logits: Tensor = self._model.get_output_embeddings()(hidden[:, -last:])
        return logits.float().log_softmax(-1)
