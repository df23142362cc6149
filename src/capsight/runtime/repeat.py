"""Feeds a prefilled context to the text model a second time, as new tokens after it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from threading import get_ident
from typing import Any

import torch
from torch import Tensor

from capsight.cache_argument import CACHE
from capsight.errors import CapsightError
from capsight.runtime.state import RuntimeState, running


class ContextRepeat:
    """Notes what a model's text part is given during prefill, so that it can be given once more.

    The vision tower does not run again, and nothing of the model is changed: a forward hook is there
    during the prefill only.
    """

    def __init__(self, model: Any) -> None:
        """Prepare for one prefill of `model`."""
        self._decoder = model.get_decoder()
        self._given: dict[str, Any] | None = None
        self._thread = 0

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Note the arguments of the first call of the text model by this thread inside the block."""
        self._thread = get_ident()
        hook = self._decoder.register_forward_pre_hook(self._note, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()

    def _note(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if self._given is None and get_ident() == self._thread:
            self._given = dict(kwargs)

    @torch.no_grad()
    def run(self, cache: Any, attention_mask: Tensor) -> None:
        """Run the text model over the context again.

        Args:
            cache: holds the context; gets its second copy.
            attention_mask: `[B, S]` of the context. The copy is plainly causal, also where the model
                lets image tokens see each other in both directions.

        Raises:
            CapsightError: nothing was recorded.
        """
        if self._given is None:
            raise CapsightError("the model's text part was not run; generate with the model itself")
        given = dict(self._given)
        positions = given.get("position_ids")
        if positions is not None:
            given["position_ids"] = _continued(positions)
        for name in ("cache_position", "past_key_values", "cache"):
            given.pop(name, None)
        self._decoder(
            **given | {CACHE: cache, "attention_mask": torch.cat([attention_mask, attention_mask], -1)}
        )

    def read(self, cache: Any, inputs: Mapping[str, Any]) -> None:
        """`run`, seen by a cache that needs to see all tokens, also those of capsules."""
        with running(RuntimeState(cache, generating=True)), cache.leaving_capsules(None):
            self.run(cache, inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])))


def _continued(positions: Tensor) -> Tensor:
    """Positions of a second copy that goes on where the first ends.

    Args:
        positions: int64 `[B, S]`, or `[C, B, S]` with the three axes of M-RoPE last of C and, if C is 4,
            plain text positions before them.
    """
    if positions.ndim == 2:
        return positions + positions.amax(-1, keepdim=True) + 1
    parts = [positions[:-3], positions[-3:]]
    return torch.cat([part + part.amax((0, 2))[:, None] + 1 for part in parts if len(part)])
