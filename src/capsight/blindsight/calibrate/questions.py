"""Several questions about the same images: a head map reads the images once, then all questions at once."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from capsight.blindsight.calibrate.answers import NEW_TOKENS, Compared, end_tokens, noted, vision_tokens
from capsight.blindsight.calibrate.capture import LayerCall, following, shape_of, watching
from capsight.blindsight.calibrate.samples import Prompt
from capsight.blindsight.categories import Category, MaskOptions
from capsight.blindsight.head_map import HeadMap
from capsight.cache_argument import CACHE, with_cache
from capsight.execution import inputs_device
from capsight.kvcapsule.cache.stock import repeat_rows


@dataclass(frozen=True, slots=True, eq=False)
class Questions:
    """Images, and what may follow them.

    Attributes:
        images: one prompt, which ends with its last image.
        tails: token ids of each question, text only, up to where the answer begins.
    """

    images: Prompt
    tails: tuple[tuple[int, ...], ...]


class QuestionAnswers(Compared):
    """Answers to several questions about the same images.

    Only rows of images follow a head map, so the questions are read over its keys and values of the images.
    What is text sees everything: questions are filled up on the right, where no answer sees it.
    """

    def __init__(self, model: Any, questions: Questions, new_tokens: int = NEW_TOKENS) -> None:
        """Let the dense model answer.

        Args:
            model: a transformers vision-language model.
            questions: Q of them.
            new_tokens: tokens of an answer, at most (n).
        """
        self._model, self._layout = model, questions.images.layout
        self._rows, self._width = len(questions.tails), max(map(len, questions.tails)) + new_tokens
        observer, cache = following(self._layout, HeadMap.all_dense(*shape_of(model))), self._cache()
        with watching(model, lambda call: observer(call)), noted(model) as given:
            model(**questions.images.inputs, **{CACHE: cache}, use_cache=True, logits_to_keep=1)
            self._images = dict(given)
            observer = self._attend
            answers = self._greedy(cache, questions, new_tokens)
            self._questions = dict(given)
        device, numbers = inputs_device(model), torch.arange(max(map(len, answers)))  # [n]
        starts, lengths = (
            torch.tensor([len(x) for x in some])[:, None] for some in (questions.tails, answers)
        )
        last = int((starts + lengths).max()) - 1
        self._places = (starts - 1 + numbers).clamp(max=last).to(device)  # [Q, n]
        super().__init__((numbers < lengths).to(device), self._read_questions(cache))

    def read(self, head_map: HeadMap) -> Tensor:
        """See `Compared.read`."""
        cache = self._cache()
        with watching(self._model, following(self._layout, head_map)):
            self._model.get_decoder()(**with_cache(self._images, cache))
        return self._read_questions(cache)

    def _cache(self) -> DynamicCache:
        return DynamicCache(config=self._model.config)

    def _read_questions(self, cache: DynamicCache) -> Tensor:
        """What `read` gives, over a cache of the images, which is of no use afterwards."""
        repeat_rows(cache, self._rows)
        with watching(self._model, self._attend):
            hidden = self._model.get_decoder()(**with_cache(self._questions, cache)).last_hidden_state
            picked = hidden.gather(1, self._places[..., None].expand(-1, -1, hidden.shape[-1]))  # [Q, n, E]
            logits: Tensor = self._model.get_output_embeddings()(picked)
        return logits.float().log_softmax(-1)

    def _attend(self, call: LayerCall) -> Tensor:
        """Attention of texts after the images, which sees everything."""
        layout = self._layout.extended(self._width).repeat(len(call.query))
        return call.attend_uniform(layout, Category.DENSE, MaskOptions(), self._layout.length)

    def _greedy(self, cache: DynamicCache, questions: Questions, new_tokens: int) -> list[list[int]]:
        """Greedy answers; the last call of the model is over all of them. `cache` stays as it is."""
        barred, ends = vision_tokens(questions.images), set(end_tokens(self._model))
        answers: list[list[int]] = [[] for _ in questions.tails]
        while open_rows := [
            row for row, said in enumerate(answers) if len(said) < new_tokens and not ends & {*said}
        ]:
            texts = [[*questions.tails[row], *answers[row]] for row in open_rows]
            logits = self._forward(cache, texts)  # [q, w, V]
            for row, text, one in zip(open_rows, texts, logits, strict=True):
                last = one[len(text) - 1].index_fill(0, torch.tensor(barred, device=one.device), -torch.inf)
                answers[row].append(int(last.argmax()))
        self._forward(cache, [[*tail, *said] for tail, said in zip(questions.tails, answers, strict=True)])
        return answers

    def _forward(self, cache: DynamicCache, texts: list[list[int]]) -> Tensor:
        """Logits `[q, w, V]` of texts over copies of a cache of one row; fillers on the right."""
        copied, width = copy.deepcopy(cache), max(map(len, texts))
        repeat_rows(copied, len(texts))
        ids = torch.tensor([text + text[-1:] * (width - len(text)) for text in texts])
        ids = ids.to(inputs_device(self._model))
        logits: Tensor = self._model(input_ids=ids, **{CACHE: copied}, use_cache=True).logits
        return logits
