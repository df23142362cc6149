"""Eviction by the scores of peers, as methods for `capsight.evaluation.evaluate`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from transformers import PreTrainedConfig

from capsight.baselines.choice import top_overall, top_per_head
from capsight.baselines.observing import (
    Observation,
    ObservingBaseline,
    ObservingCache,
    ObservingLayer,
    at_runs,
)
from capsight.baselines.seen import Seen
from capsight.kvcapsule.codecs.rotary import Rotary
from capsight.kvcapsule.plan import Run
from capsight.layout import PromptLayout
from capsight.layout.positions import rope_positions
from peers.tokens import Tokens

Score = Callable[[Tokens, float], Tensor]


class PeerEviction(ObservingBaseline):
    """Keeps the vision tokens that score highest: all tokens are scored, vision tokens compete.

    Text stays exact and positions logical, as with all baselines. `pooled` lets the KV heads of a layer
    share their budget; kvpress gives every head the same.
    """

    joint = False

    def __init__(
        self, name: str, score: Score, rotary: Rotary, retained: float, block_size: int, pooled: bool = False
    ) -> None:
        """Take a score (of `peers.scores`) and how the model turns its keys."""
        super().__init__(retained, block_size)
        self.name = name  # type: ignore[misc]
        self._score, self._rotary, self._pooled = score, rotary, pooled

    def look(self, seen: Seen, runs: Sequence[Run]) -> Observation:
        """Not used: these scores need values, too; see `scores`."""
        raise NotImplementedError

    def scores(self, seen: Seen, value: Tensor, positions: Tensor, runs: Sequence[Run]) -> Observation:
        """Score the tokens of M runs; `value` is `[1, H, S, D]`, `positions` `[3, S]`."""
        tokens = Tokens.of(seen, value, positions, self._rotary)
        return Observation(at_runs(self._score(tokens, self.retained)[None], runs, self.block_size))

    def choose(self, observed: Sequence[Observation], runs: Sequence[Run]) -> list[Tensor]:
        """Each head, or the heads of a layer together, keep the highest scores of a prompt."""
        counts = self.budgets(runs)
        if self._pooled:
            return [top_overall(layer.scores[None], runs, counts)[0] for layer in observed]
        return [top_per_head(layer.scores, runs, counts) for layer in observed]

    def _new_cache(self, layout: PromptLayout, config: PreTrainedConfig) -> PeerCache:
        return PeerCache(self, layout, config)


class PeerCache(ObservingCache):
    """Shows a method the values of a prefill beside its queries and keys."""

    _method: PeerEviction

    def __init__(self, method: PeerEviction, layout: PromptLayout, config: PreTrainedConfig) -> None:
        """Make an empty cache."""
        super().__init__(method, layout, config)
        self._positions = rope_positions(layout, config)[:, 0]
        self._values: Tensor | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Note the values, which `observe` is not given."""
        self._values = value_states
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def observe(
        self, layer_idx: int, query: Tensor, key: Tensor, attention_mask: Tensor | None, scaling: float
    ) -> None:
        """Score one layer's tokens, and keep the best."""
        layer, values, self._values = self.layers[layer_idx], self._values, None
        if isinstance(layer, ObservingLayer) and layer.pending and not self._all_kept:
            assert values is not None
            seen = Seen(query, key, attention_mask, scaling, self._ledger.plan.pads)
            layer.observed = self._method.scores(seen, values, self._positions, layer.pending)
            self._thin([layer])
