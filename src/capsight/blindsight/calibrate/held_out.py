"""What a head map costs on prompts that did not vote."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from capsight.blindsight.calibrate.capture import following, shape_of, watching
from capsight.blindsight.calibrate.forward import disagreement, divergence, tail_log_probabilities
from capsight.blindsight.calibrate.samples import Prompt
from capsight.blindsight.head_map import HeadMap
from capsight.errors import CalibrationError


class HeldOut:
    """Compares a head map with the dense model on a few prompts, at every position after the images.

    Both measures are drops: 0 for an all-Dense map. The dense model's answers are computed once and
    kept, `n x V` numbers a prompt.
    """

    def __init__(self, model: Any, prompts: Sequence[Prompt]) -> None:
        """Run the dense model over the prompts.

        Args:
            model: a transformers vision-language model.
            prompts: kept in memory, pixels included.

        Raises:
            CalibrationError: there are none.
        """
        if not prompts:
            raise CalibrationError(
                "no held-out prompts to measure the drop on: pass more samples (every fourth is held out), "
                "held_out=..., evaluate=..., or tolerance=None for no recovery pass"
            )
        self._model, self._prompts = model, list(prompts)
        dense = HeadMap.all_dense(*shape_of(model))
        self._before = [self._run(prompt, dense) for prompt in self._prompts]

    def kl(self, head_map: HeadMap) -> float:
        """KL divergence of the next-token distributions from the dense model's, mean over prompts, nats."""
        return self._mean(head_map, divergence)

    def disagreement(self, head_map: HeadMap) -> float:
        """Fraction of positions whose most likely next token is not the dense model's (0..1)."""
        return self._mean(head_map, disagreement)

    def _mean(self, head_map: HeadMap, measure: Callable[[Tensor, Tensor], float]) -> float:
        pairs = zip(self._prompts, self._before, strict=True)
        drops = [measure(before, self._run(prompt, head_map)) for prompt, before in pairs]
        return sum(drops) / len(drops)

    def _run(self, prompt: Prompt, head_map: HeadMap) -> Tensor:
        with watching(self._model, following(prompt.layout, head_map)):
            return tail_log_probabilities(self._model, prompt.inputs, prompt.layout)
