"""What a head map costs on prompts that did not vote."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from transformers import PreTrainedModel

from capsight.blindsight.calibrate.answers import NEW_TOKENS, Answers, Compared
from capsight.blindsight.calibrate.questions import QuestionAnswers, Questions
from capsight.blindsight.calibrate.samples import Prompt
from capsight.blindsight.head_map import HeadMap
from capsight.errors import CalibrationError


class HeldOut:
    """Compares a head map with the dense model on a few prompts, by the answers that the dense model gives.

    Both measures are drops: 0 for an all-Dense map. No right answers are needed: accuracy cannot fall by
    more than the share of answers that change.
    """

    def __init__(
        self, model: PreTrainedModel, prompts: Iterable[Prompt | Questions], new_tokens: int = NEW_TOKENS
    ) -> None:
        """Let the dense model answer the prompts.

        Args:
            model: a transformers vision-language model.
            prompts: what goes into their text part is kept in memory, and `n x V` numbers for each row or
                question. Several questions about the same images are faster as one `Questions`.
            new_tokens: tokens of an answer that are looked at, at most (n).

        Raises:
            CalibrationError: there are no prompts.
        """
        self._answers: list[Compared] = [
            QuestionAnswers(model, prompt, new_tokens)
            if isinstance(prompt, Questions)
            else Answers(model, prompt, new_tokens)
            for prompt in prompts
        ]
        if not self._answers:
            raise CalibrationError(
                "no held-out prompts to measure the drop on: pass more samples (every fourth is held out), "
                "held_out=..., evaluate=..., or tolerance=None for no recovery pass"
            )

    def kl(self, head_map: HeadMap) -> float:
        """KL divergence of the next-token distributions from the dense model's, mean over answers, nats."""
        return float(torch.cat([answers.kl(head_map) for answers in self._answers]).mean())

    def changed(self, head_map: HeadMap, most: float = 1.0) -> float:
        """Share of the answers that would be other ones (0..1).

        Args:
            head_map: what is compared.
            most: a larger share is not counted to its end; what is returned is then larger than this, too.
        """
        total, changed = sum(len(answers.counted) for answers in self._answers), 0
        for place, answers in enumerate([*self._answers]):
            other = int(answers.changed(head_map).sum())
            if other:  # these tell soonest of the next map, too
                self._answers.insert(0, self._answers.pop(place))
            changed += other
            if changed > most * total:
                break
        return changed / total
