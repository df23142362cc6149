"""Asks a model the questions of an item, by either of two protocols.

- ``after``: the images are prefilled and encapsulated first; every question comes as new tokens over the
  capsules, so all that the model says has to come through them. This is the judge.
- ``within``: images and question are one prefill; the first answer token comes from the full cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from capsight.cache_argument import CACHE
from capsight.errors import OptionError
from capsight.evaluation.batches import in_batches
from capsight.evaluation.cache_bytes import CacheBytes
from capsight.evaluation.drafts import GREEDY, append_tokens
from capsight.evaluation.items import Item
from capsight.evaluation.prompting import process, question_tokens
from capsight.execution import inputs_device
from capsight.layout import build_layout
from capsight.runtime import FastModel
from capsight.runtime.split import TOKEN_ENTRIES, first_tokens

PROTOCOLS = ("after", "within")


@dataclass(frozen=True, slots=True)
class Answers:
    """What a model said to the questions of one item.

    Attributes:
        texts: one answer per question.
        first_logits: `[Q, V]` float32, logits of the first answer token.
        nbytes: of the cache: after the images, once for all questions ("after"), or of one row per question
            ("within").
    """

    texts: tuple[str, ...]
    first_logits: Tensor
    nbytes: CacheBytes


def ask_item(
    fast: FastModel, processor: Any, item: Item, protocol: str = "after", max_new_tokens: int = 24
) -> Answers:
    """Ask all questions of one item, greedily and independently of each other.

    Args:
        fast: the model inside `enable`.
        processor: its processor (left padding).
        item: images and questions.
        protocol: "after" or "within".
        max_new_tokens: most tokens of an answer.

    Raises:
        OptionError: the protocol is unknown.
    """
    if protocol not in PROTOCOLS:
        raise OptionError(f"protocol is {protocol!r}; use 'after' or 'within'")
    questions = [ask.question for ask in item.asks]

    def answers(cache: Any, inputs: dict[str, Any]) -> tuple[list[str], Tensor, Any]:
        out: Any = fast.generate(
            past_key_values=cache,
            **inputs,
            max_new_tokens=max_new_tokens,
            **GREEDY,
            output_logits=True,
            return_dict_in_generate=True,
        )
        new = out.sequences[:, inputs["input_ids"].shape[1] :]
        texts = processor.tokenizer.batch_decode(new, skip_special_tokens=True)
        return [text.strip() for text in texts], out.logits[0].float(), out[CACHE]

    if protocol == "within" or not item.images:
        inputs = to_device(process(processor, item, questions), fast.device)
        texts, logits, filled = answers(fast.new_cache(inputs), inputs)
        return Answers(tuple(texts), logits, CacheBytes.of(filled))
    head, tails = split_questions(fast.model, processor, item, questions)
    cache = fast.encapsulate(**head)
    sizes, tokens, pad = CacheBytes.of(cache), tokens_of(head), processor.tokenizer.pad_token_id
    answered = in_batches(
        cache, tails, lambda repeated, some: answers(repeated, append_tokens(tokens, some, pad))[:2]
    )
    return Answers(tuple(answered[0]), answered[1], sizes)


def split_questions(
    model: Any, processor: Any, item: Item, questions: Sequence[str]
) -> tuple[dict[str, Any], list[list[int]]]:
    """Processor outputs `[1, S]` up to the last image, and the tokens of what follows, by question."""
    inputs = to_device(process(processor, item, questions[:1]), inputs_device(model))
    split = build_layout(inputs, model.config).last_vision_end
    return first_tokens(inputs, split), question_tokens(processor, model.config, len(item.images), questions)


def tokens_of(inputs: dict[str, Any]) -> dict[str, Tensor]:
    """The entries with one column per token."""
    return {key: value for key, value in inputs.items() if key in TOKEN_ENTRIES}


def to_device(inputs: dict[str, Any], device: Any) -> dict[str, Any]:
    """The same inputs, their tensors on a device."""
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in inputs.items()}
