"""What a head map costs on prompts that did not vote."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from transformers import PreTrainedModel

from capsight.blindsight.calibrate.answers import NEW_TOKENS, Answers
from capsight.blindsight.calibrate.samples import Prompt
from capsight.blindsight.head_map import HeadMap
from capsight.errors import CalibrationError


class HeldOut:
    """Compares a head map with the dense model on a few prompts, by the answers that the dense model gives.

    Both measures are drops: 0 for an all-Dense map. No right answers are needed: accuracy cannot fall by
    more than the share of answers that change.
    """

    def __init__(
        self, model: PreTrainedModel, prompts: Iterable[Prompt], new_tokens: int = NEW_TOKENS
    ) -> None:
        """Let the dense model answer the prompts.

        Args:
            model: a transformers vision-language model.
            prompts: what goes into their text part is kept in memory, and `n x V` numbers for each row.
            new_tokens: tokens of an answer that are looked at, at most (n).

        Raises:
            CalibrationError: there are no prompts.
        """
        self._answers = [Answers(model, prompt, new_tokens) for prompt in prompts]
        if not self._answers:
            raise CalibrationError(
                "no held-out prompts to measure the drop on: pass more samples (every fourth is held out), "
                "held_out=..., evaluate=..., or tolerance=None for no recovery pass"
            )

    def kl(self, head_map: HeadMap) -> float:
        """KL divergence of the next-token distributions from the dense model's, mean over answers, nats."""
        return float(torch.cat([answers.kl(head_map) for answers in self._answers]).mean())

    def changed(self, head_map: HeadMap) -> float:
        """Share of the answers that would be other ones (0..1)."""
        return float(torch.cat([answers.changed(head_map) for answers in self._answers]).float().mean())
