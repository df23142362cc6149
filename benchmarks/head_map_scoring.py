"""Asks a judge the questions of a prompt under one head map after the other, quickly.

The vision tower runs once per prompt and the images are prefilled once per head map; questions and answers
are then read in one batch. An answer counts as given if it is the most likely token at every position, its
end included: exactly then greedy decoding writes it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from capsight.blindsight import HeadMap
from capsight.blindsight.calibrate.capture import following, shape_of, untouched, watching
from capsight.evaluation import Item, Outcome
from capsight.evaluation.prompting import chat_text, process
from capsight.layout import build_layout

MOST_TOKENS = 16
"""Tokens of the dense model's own answers, at most."""


@dataclass(frozen=True, slots=True)
class Score:
    """What became of questions."""

    outcomes: tuple[Outcome, ...] = ()

    @property
    def questions(self) -> int:
        """How many there are."""
        return len(self.outcomes)

    @property
    def right(self) -> int:
        """How many answers are right."""
        return sum(outcome.right == 1 for outcome in self.outcomes)

    @property
    def agrees(self) -> int:
        """How many answers are the dense model's."""
        return sum(outcome.agrees for outcome in self.outcomes)

    def __add__(self, other: Score) -> Score:
        """Both together."""
        return Score(self.outcomes + other.outcomes)


class Scored:
    """One prompt with several questions; memory: the embedded images."""

    def __init__(self, model: Any, processor: Any, item: Item, lead: str = "") -> None:
        """Run the vision tower, and let the dense model answer.

        Args:
            model: the reference VLM, or a judge of plain RoPE.
            processor: its processor.
            item: images, questions and right answers.
            lead: what the model writes before an answer.
        """
        self._model, tokenizer = model, processor.tokenizer
        self._item, self.images = item, len(item.images)
        inputs = process(processor, item, [item.asks[0].question])
        layout = build_layout(inputs, model.config)
        split = layout.last_vision_end
        self.layout = layout.prefix(split)
        self._given = self._embedded(inputs, split)
        texts = [chat_text(processor, self.images, ask.question) for ask in item.asks]
        ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        begin = len(ids[0]) - (layout.length - split)  # the same text precedes every question
        self._questions = [row[begin:] for row in ids]
        self._end = int(tokenizer.eos_token_id)
        right = [tokenizer(lead + ask.answer, add_special_tokens=False)["input_ids"] for ask in item.asks]
        self._right = [[*row, self._end] for row in right]
        self._dense = self._written(HeadMap.all_dense(*shape_of(model)))

    def score(self, head_map: HeadMap) -> Score:
        """How many answers are right, and how many are the dense model's."""
        pairs = zip(self._right, self._dense, strict=True)
        other = [index for index, (right, dense) in enumerate(pairs) if right != dense]
        questions = [*self._questions, *(self._questions[i] for i in other)]
        answers = [*self._right, *(self._dense[i] for i in other)]
        said = self._read(self._prefilled(head_map), questions, answers)
        given = [a == b for a, b in zip(said, answers, strict=True)]
        agrees = given[: len(self._right)]
        for place, index in enumerate(other, len(self._right)):
            agrees[index] = given[place]
        return Score(
            tuple(
                Outcome(self._item.name, ask.task, self.images, float(a), b, 0.0)
                for ask, a, b in zip(self._item.asks, given, agrees, strict=False)
            )
        )

    def _embedded(self, inputs: dict[str, Any], split: int) -> dict[str, Tensor]:
        """What the text part gets for the images: `inputs_embeds [1, P, E]`, `position_ids [(3,) 1, P]`."""
        given: dict[str, Any] = {}
        hook = self._model.get_decoder().register_forward_pre_hook(
            lambda module, args, kwargs: given.update(kwargs), with_kwargs=True
        )
        try:
            with untouched(self._model):
                self._model(**inputs, use_cache=False, logits_to_keep=1)
        finally:
            hook.remove()
        positions = given.get("position_ids")
        if positions is None:
            positions = torch.arange(split)[None]
        return {
            "inputs_embeds": given["inputs_embeds"][:, :split],
            "position_ids": positions[-3:, ..., :split],  # Qwen2.5-VL's first row is the text's
        }

    def _prefilled(self, head_map: HeadMap) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of the images, layer by layer."""
        cache = DynamicCache(config=self._model.config.get_text_config())
        with watching(self._model, following(self.layout, head_map)):
            self._model.get_decoder()(**self._given, past_key_values=cache, use_cache=True)
        return [(layer.keys, layer.values) for layer in cache.layers]

    def _read(
        self, prefix: list[tuple[Tensor, Tensor]], questions: list[list[int]], answers: list[list[int]]
    ) -> list[list[int]]:
        """The most likely token at each position of each answer, given what comes before it."""
        rows = [[*question, *answer] for question, answer in zip(questions, answers, strict=True)]
        width = max(map(len, rows))
        tokens = torch.tensor([row + [self._end] * (width - len(row)) for row in rows])
        cache = DynamicCache(config=self._model.config.get_text_config())
        for layer, (key, value) in enumerate(prefix):
            cache.update(key.expand(len(rows), -1, -1, -1), value.expand(len(rows), -1, -1, -1), layer)
        first = int(self._given["position_ids"].max()) + 1
        axes = self._given["position_ids"].shape[:-2]  # three with M-RoPE
        positions = torch.arange(first, first + width).expand(*axes, len(rows), -1)
        with untouched(self._model):
            hidden = self._model.get_decoder()(
                input_ids=tokens, position_ids=positions, past_key_values=cache, use_cache=True
            ).last_hidden_state
            said = self._model.get_output_embeddings()(hidden).argmax(-1).tolist()
        starts = [len(question) - 1 for question in questions]
        return [
            row[start : start + len(answer)] for row, start, answer in zip(said, starts, answers, strict=True)
        ]

    def _written(self, head_map: HeadMap) -> list[list[int]]:
        """Greedy answers: drafts, the right ones at first, are corrected at their first wrong token."""
        prefix, drafts = self._prefilled(head_map), [list(row) for row in self._right]
        open_rows = set(range(len(drafts)))
        for _ in range(4 * MOST_TOKENS):  # a draft grows in every pass, unless two tokens are equally likely
            if not open_rows:
                break
            for row, said in enumerate(
                self._read(prefix, self._questions, [[*d, self._end] for d in drafts])
            ):
                draft = drafts[row]
                wrong = next((i for i, token in enumerate(draft) if said[i] != token), None)
                if wrong is not None:
                    draft[wrong:] = [said[wrong]]
                elif draft[-1] != self._end and len(draft) < MOST_TOKENS:
                    draft.append(said[len(draft)])
                else:
                    open_rows.discard(row)
        return drafts
