"""The dense model's own answers to a batch of prompts, and what becomes of them under a head map."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from capsight.attention_swap import unserved
from capsight.blindsight.calibrate.capture import following, shape_of, untouched, watching
from capsight.blindsight.calibrate.samples import Prompt
from capsight.blindsight.head_map import HeadMap
from capsight.layout import PromptLayout

NEW_TOKENS = 12
"""Tokens of an answer that are looked at, at most."""


class Answers:
    """Greedy answers of the dense model, written once and then read over by a head map in one pass.

    Reading over an answer tells whether a head map would have written the same: it would, exactly if its
    most likely token is the answer's at every position. Memory: `B x n x V` numbers.
    """

    def __init__(self, model: Any, prompt: Prompt, new_tokens: int = NEW_TOKENS) -> None:
        """Let the dense model answer.

        Args:
            model: a transformers vision-language model.
            prompt: one or more prompts in a batch.
            new_tokens: tokens of an answer, at most (n).
        """
        tokens = _greedy(model, prompt, new_tokens)  # [B, n]
        self._counted = _until_end(tokens, model.generation_config.eos_token_id)  # [B, n]
        layout = prompt.layout.extended(tokens.shape[1])
        self._text = TextPart(model, _continued(prompt.inputs, tokens), layout)
        self._before = self._read(HeadMap.all_dense(*shape_of(model)))

    def kl(self, head_map: HeadMap) -> Tensor:
        """KL divergence from the dense model's distributions, mean over an answer, nats: float32 `[B]`."""
        after = self._read(head_map)
        each = (self._before.exp() * (self._before - after)).sum(-1)  # [B, n]
        return (each * self._counted).sum(-1) / self._counted.sum(-1)

    def changed(self, head_map: HeadMap) -> Tensor:
        """Whether an answer would be another one: bool `[B]`."""
        other = self._before.argmax(-1) != self._read(head_map).argmax(-1)
        return (other & self._counted).any(-1)

    def _read(self, head_map: HeadMap) -> Tensor:
        """Log-probabilities at the positions before each token of the answers: `[B, n, V]`."""
        return self._text.log_probabilities(head_map, self._counted.shape[1] + 1)[:, :-1]


def _greedy(model: Any, prompt: Prompt, new_tokens: int) -> Tensor:
    """Greedy answers `[B, n]`; no vision tokens, which a text part alone could not read."""
    ids = prompt.inputs["input_ids"]
    vision = {int(ids[i, b.start]) for i, row in enumerate(prompt.layout.rows) for b in row.blocks}
    with untouched(model), unserved():
        written = model.generate(
            **prompt.inputs,
            max_new_tokens=new_tokens,
            do_sample=False,
            num_beams=1,
            suppress_tokens=sorted(vision),
        )
    return written[:, ids.shape[1] :]


def _until_end(tokens: Tensor, ends: int | list[int] | None) -> Tensor:
    """Which tokens of answers `[B, n]` count: all up to the first that ends the answer, that one included."""
    known = torch.tensor([] if ends is None else ends, dtype=tokens.dtype, device=tokens.device).view(-1)
    ended = torch.isin(tokens, known).int().cumsum(-1)
    return torch.cat([torch.zeros_like(ended[:, :1]), ended[:, :-1]], -1) == 0


def _continued(inputs: Mapping[str, Any], tokens: Tensor) -> dict[str, Any]:
    """Processor outputs with tokens of text after each row."""
    new = {
        "input_ids": tokens,
        "attention_mask": torch.ones_like(tokens),
        "mm_token_type_ids": torch.zeros_like(tokens),
        "token_type_ids": torch.zeros_like(tokens),
    }
    return {
        name: torch.cat([value, new[name].to(value.dtype)], -1) if name in new else value
        for name, value in inputs.items()
    }


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
