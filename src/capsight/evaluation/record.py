"""What is kept of one item: who was right, who agreed with the full cache, and bytes; a line of JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from capsight.evaluation.asking import Answers
from capsight.evaluation.items import Item
from capsight.evaluation.metric import exact_match, score
from capsight.evaluation.sharing import FULL


@dataclass(frozen=True, slots=True)
class MethodRecord:
    """One method on one item; lists have one entry per question.

    Attributes:
        texts: its answers.
        right: how right they are, 0-1; None where no right answer is known.
        agrees: whether they equal the full cache's.
        kl: KL divergence of the first answer token from the full cache's distribution, in nats.
        nbytes: bytes of keys and values in its cache before the answers, or of what stands for them.
        nbytes_full: those of a full cache for the same tokens.
        state_nbytes: bytes of states (linear attention, convolutions) beside them.
    """

    texts: list[str]
    right: list[float | None]
    agrees: list[bool]
    kl: list[float]
    nbytes: int
    nbytes_full: int
    state_nbytes: int = 0


@dataclass(frozen=True, slots=True)
class ItemRecord:
    """One item.

    Attributes:
        item: its name.
        images: its image count.
        tasks: the task of each question.
        methods: what each method did.
    """

    item: str
    images: int
    tasks: list[str]
    methods: dict[str, MethodRecord]

    @classmethod
    def of(cls, item: Item, answers: Mapping[str, Answers], metric: str = "exact") -> ItemRecord:
        """Compare answers with the right ones, by `metric`, and with those of the full cache, exactly."""
        full = answers[FULL]
        theirs = full.first_logits.log_softmax(-1)
        methods = {}
        for name, ours in answers.items():
            kl = (theirs.exp() * (theirs - ours.first_logits.log_softmax(-1))).sum(-1).clamp_min(0)
            methods[name] = MethodRecord(
                list(ours.texts),
                [score(text, a.references, metric) for text, a in zip(ours.texts, item.asks, strict=True)],
                [exact_match(text, other) for text, other in zip(ours.texts, full.texts, strict=True)],
                [round(value, 8) for value in kl.tolist()],
                *ours.nbytes,
            )
        return cls(item.name, len(item.images), [ask.task for ask in item.asks], methods)

    def to_json(self) -> dict[str, Any]:
        """JSON-ready values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> ItemRecord:
        """What `to_json` gave.

        Raises:
            KeyError, TypeError: it did not.
        """
        methods = {name: MethodRecord(**row) for name, row in values["methods"].items()}
        return cls(values["item"], values["images"], values["tasks"], methods)
