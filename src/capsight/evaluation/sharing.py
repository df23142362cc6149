"""Asks the questions of one item with many methods, whose caches all come from one prefill."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from capsight.blindsight import HeadMap
from capsight.errors import OptionError
from capsight.evaluation.asking import (
    PROTOCOLS,
    Answers,
    ask_item,
    process,
    split_questions,
    to_device,
)
from capsight.evaluation.batches import in_batches
from capsight.evaluation.cache_bytes import CacheBytes
from capsight.evaluation.drafts import Rows, append_tokens, check, end_tokens, until_end, write
from capsight.evaluation.items import Item
from capsight.evaluation.prefill import Prefill, observes
from capsight.execution import inputs_device
from capsight.kvcapsule import CacheMethod, ContextRepeater
from capsight.kvcapsule.method import for_model, reads_latent
from capsight.layout import build_layout
from capsight.runtime import enable

FULL = "full"
"""The stock cache after dense prefill, which everything is compared with."""

FULL_SPARSE = "full + head map"
"""The stock cache after a prefill that follows the head map."""


@dataclass(frozen=True, slots=True)
class Asking:
    """How questions are asked.

    Attributes:
        model: the model.
        processor: its processor (left padding).
        methods: name -> capsule or baseline.
        protocol: "after" or "within".
        head_map: prefill of every method follows it; that of the full cache stays dense.
        max_new_tokens: most tokens of an answer.
    """

    model: Any
    processor: Any
    methods: Mapping[str, CacheMethod]
    protocol: str = "after"
    head_map: HeadMap | None = None
    max_new_tokens: int = 24

    def __post_init__(self) -> None:
        """Refuse what cannot be run, before the long work.

        Raises:
            OptionError: the protocol is unknown, or a method has a name that is taken.
            CapsightError: a method or the head map does not fit the model.
        """
        if self.protocol not in PROTOCOLS:
            raise OptionError(f"protocol is {self.protocol!r}; use 'after' or 'within'")
        if taken := {FULL, FULL_SPARSE} & set(self.methods):
            raise OptionError(f"the name {taken.pop()!r} is taken; call the method something else")
        for method in self.methods.values():
            method.check_model(self.model)

    @property
    def names(self) -> list[str]:
        """Everything that answers: the full cache, then the methods."""
        return [FULL, *([FULL_SPARSE] if self.head_map else []), *self.methods]

    def ask(self, item: Item) -> Iterator[tuple[str, Answers]]:
        """Answers of everything in `names`, in that order, to all questions of an item."""
        everything: dict[str, CacheMethod | None] = dict.fromkeys(self.names)
        everything |= {name: for_model(method, self.model) for name, method in self.methods.items()}
        if not item.images:
            yield from ((name, self._alone(item, name)) for name in everything)
            return
        # One context for all: capsight's attention function is the stock one with what a cache may add.
        needy = next((m for m in self.methods.values() if m.needs_attention or reads_latent(m)), None)
        with enable(self.model, capsule=needy, head_map=self.head_map, prefill="sparse"):
            dense = _Prompt(self, item, None)
            sparse = dense if self.head_map is None else _Prompt(self, item, self.head_map)
            for name, method in everything.items():
                prompt = dense if name == FULL else sparse
                if self.protocol == "within" and method is not None and prompt.read_twice(method):
                    yield name, self._alone(item, name)
                else:
                    yield name, prompt.answers(method)

    def _alone(self, item: Item, name: str) -> Answers:
        head_map = None if name == FULL else self.head_map
        with enable(self.model, capsule=self.methods.get(name), head_map=head_map, prefill="sparse") as fast:
            return ask_item(fast, self.processor, item, self.protocol, self.max_new_tokens)


class _Prompt:
    """The recorded prefill of one item, dense or sparse, and how its questions follow."""

    def __init__(self, asking: Asking, item: Item, head_map: HeadMap | None) -> None:
        questions = [ask.question for ask in item.asks]
        model, processor = asking.model, asking.processor
        self._after = asking.protocol == "after"
        self._processor, self._limit = processor, asking.max_new_tokens
        self._pad, self._ends = processor.tokenizer.pad_token_id, end_tokens(model)
        if self._after:
            inputs, self._tails = split_questions(model, processor, item, questions)
        else:
            inputs = to_device(process(processor, item, questions), inputs_device(model))
        self._layout, self._config = build_layout(inputs, model.config), model.config
        observe = head_map is asking.head_map and any(
            method.needs_attention and observes(method, self._layout, model.config)
            for method in asking.methods.values()
        )
        self._prefill = Prefill.record(model, inputs, head_map, observe)
        self._firsts: list[int] = self._prefill.first_logits.argmax(-1).tolist()
        self._drafts: Rows | None = None

    def read_twice(self, method: CacheMethod) -> bool:
        """Whether the method reads the context twice."""
        return isinstance(method.cache(self._layout, self._config), ContextRepeater)

    def answers(self, method: CacheMethod | None) -> Answers:
        """Fill a method's cache and let it answer; the stock cache (None) comes first and drafts for all."""
        cache = self._prefill.cache(method)
        nbytes = CacheBytes.of(cache)
        tokens, first = self._over(cache) if self._after else self._on(cache)
        if method is None:
            self._drafts = tokens
        texts = self._processor.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return Answers(tuple(text.strip() for text in texts), first, nbytes)

    def _over(self, cache: Any) -> tuple[list[list[int]], Tensor]:
        """Protocol `after`: the questions are new tokens over the cache, one row each."""

        def ask(repeated: Any, tails: Sequence[list[int]]) -> tuple[list[list[int]], Tensor]:
            drafts = self._drafts if len(tails) == len(self._tails) else None
            return self._decode(repeated, tails, drafts, self._limit)

        return in_batches(cache, self._tails, ask, self._prefill.copied)

    def _on(self, cache: Any) -> tuple[list[list[int]], Tensor]:
        """Protocol `within`: the prefill gave the first token; the others are decoded over the cache."""
        tokens = [[token] for token in self._firsts]
        if self._limit > 1 and not self._ends.issuperset(self._firsts):
            rest = None if self._drafts is None else [draft[1:] for draft in self._drafts]
            more, _ = self._decode(cache, tokens, rest, self._limit - 1)
            tokens = [until_end([*a, *b], self._ends, self._limit) for a, b in zip(tokens, more, strict=True)]
        return tokens, self._prefill.first_logits

    def _decode(
        self, cache: Any, tails: Sequence[list[int]], drafts: Rows | None, limit: int
    ) -> tuple[list[list[int]], Tensor]:
        tokens = self._prefill.tokens
        if drafts is None:
            return write(self._prefill, cache, append_tokens(tokens, tails, self._pad), limit, self._pad)
        return check(self._prefill, cache, tokens, tails, drafts, limit, self._pad)
