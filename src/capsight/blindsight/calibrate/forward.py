"""Next-token distributions after a prompt's last image, and how far two of them are apart."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from capsight.layout import PromptLayout


def tail_log_probabilities(model: Any, inputs: Mapping[str, Any], layout: PromptLayout) -> Tensor:
    """Log-probabilities of the next token at every position that follows all images.

    Args:
        model: with whatever attention it has at the moment.
        inputs: processor outputs.
        layout: their layout.

    Returns:
        float32 `[B, n, V]`; n is 1 where the prompts end with an image.
    """
    keep = max(layout.length - layout.last_vision_end, 1)
    logits: Tensor = model(**inputs, use_cache=False, logits_to_keep=keep).logits
    return logits[:, -keep:].float().log_softmax(-1)


def divergence(before: Tensor, after: Tensor) -> float:
    """KL(before || after) in nats, mean over positions, of log-probabilities `[B, n, V]`."""
    return float((before.exp() * (before - after)).sum(-1).mean())


def disagreement(before: Tensor, after: Tensor) -> float:
    """Fraction of positions whose most likely token differs, of log-probabilities `[B, n, V]`."""
    return float((before.argmax(-1) != after.argmax(-1)).float().mean())
