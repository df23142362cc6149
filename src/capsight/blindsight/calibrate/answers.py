"""The dense model's own answers to a batch of prompts, and what becomes of them under a head map."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
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


class Compared(ABC):
    """Greedy answers of the dense model, written once and then read over by a head map in one pass.

    Reading over an answer tells whether a head map would have written the same: it would, exactly if its
    most likely token is the answer's at every position. Memory: `B x n x V` numbers.

    Attributes:
        counted: which tokens belong to an answer, bool `[B, n]`.
    """

    def __init__(self, counted: Tensor, before: Tensor) -> None:
        """Keep what the dense model says.

        Args:
            counted: bool `[B, n]`.
            before: what `read` gives for it.
        """
        self.counted, self._before = counted, before

    @abstractmethod
    def read(self, head_map: HeadMap) -> Tensor:
        """Log-probabilities at the positions before each token of the answers: float32 `[B, n, V]`."""

    def kl(self, head_map: HeadMap) -> Tensor:
        """KL divergence from the dense model's distributions, mean over an answer, nats: float32 `[B]`."""
        after = self.read(head_map)
        each = (self._before.exp() * (self._before - after)).sum(-1)  # [B, n]
        return (each * self.counted).sum(-1) / self.counted.sum(-1)

    def changed(self, head_map: HeadMap) -> Tensor:
        """Whether an answer would be another one: bool `[B]`."""
        other = self._before.argmax(-1) != self.read(head_map).argmax(-1)
        return (other & self.counted).any(-1)


class Answers(Compared):
    """Answers to a batch of prompts; a head map reads prompts and answers in one pass of the text part.

    Attributes:
        text: the text part's own arguments.
    """

    def __init__(self, model: Any, prompt: Prompt, new_tokens: int = NEW_TOKENS) -> None:
        """Let the dense model answer.

        Args:
            model: a transformers vision-language model.
            prompt: one or more prompts in a batch.
            new_tokens: tokens of an answer, at most (n).
        """
        tokens = _greedy(model, prompt, new_tokens)  # [B, n]
        counted = _until_end(tokens, end_tokens(model))  # [B, n]
        layout = prompt.layout.extended(tokens.shape[1])
        self.text = TextPart(model, _continued(prompt.inputs, tokens), layout)
        self._last = tokens.shape[1] + 1
        super().__init__(counted, self.read(HeadMap.all_dense(*shape_of(model))))

    def read(self, head_map: HeadMap) -> Tensor:
        """See `Compared.read`."""
        return self.text.logits(head_map, self._last)[:, :-1].log_softmax(-1)


def vision_tokens(prompt: Prompt) -> list[int]:
    """The ids of the tokens that stand for images: no answer may hold one, a text part could not read it."""
    ids = prompt.inputs["input_ids"]
    return sorted({int(ids[i, b.start]) for i, row in enumerate(prompt.layout.rows) for b in row.blocks})


def _greedy(model: Any, prompt: Prompt, new_tokens: int) -> Tensor:
    """Greedy answers `[B, n]`."""
    ids = prompt.inputs["input_ids"]
    with untouched(model), unserved():
        written = model.generate(
            **prompt.inputs,
            max_new_tokens=new_tokens,
            do_sample=False,
            num_beams=1,
            suppress_tokens=vision_tokens(prompt),
        )
    return written[:, ids.shape[1] :]


def end_tokens(model: Any) -> list[int]:
    """The tokens that end an answer."""
    ends = model.generation_config.eos_token_id
    return ends if isinstance(ends, list) else [] if ends is None else [ends]


def _until_end(tokens: Tensor, ends: list[int]) -> Tensor:
    """Which tokens of answers `[B, n]` count: all up to the first that ends the answer, that one included."""
    known = torch.tensor(ends, dtype=tokens.dtype, device=tokens.device)
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
        self._model, self.layout = model, layout
        with watching(model, following(layout, HeadMap.all_dense(*shape_of(model)))), noted(model) as given:
            model(**inputs, use_cache=False, logits_to_keep=1)
        self._given = dict(given)

    def logits(self, head_map: HeadMap, last: int) -> Tensor:
        """Logits of the next token at the last positions.

        Args:
            head_map: what attention follows.
            last: how many positions.

        Returns:
            float32 `[B, last, V]`.
        """
        with watching(self._model, following(self.layout, head_map)):
            return self.observed(last)

    def observed(self, last: int) -> Tensor:
        """The same where attention is `watching`."""
        hidden = self._model.get_decoder()(**self._given).last_hidden_state
        logits: Tensor = self._model.get_output_embeddings()(hidden[:, -last:])
        return logits.float()


@contextmanager
def noted(model: Any) -> Iterator[dict[str, Any]]:
    """The arguments that the model's text part was last called with inside the context."""
    given: dict[str, Any] = {}

    def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        given.clear()
        given.update(kwargs)

    hook = model.get_decoder().register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield given
    finally:
        hook.remove()
