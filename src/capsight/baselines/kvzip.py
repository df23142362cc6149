"""KVzip-style eviction: what the model needs to say its context again (arXiv 2505.23416)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache

from capsight.baselines.choice import top_overall
from capsight.baselines.observing import Observation, ObservingBaseline, ObservingCache, at_runs
from capsight.baselines.seen import Seen
from capsight.kvcapsule.plan import Run
from capsight.layout import PromptLayout


class KVzip(ObservingBaseline):
    """After KVzip, https://arxiv.org/abs/2505.23416: query-agnostic importance by context reconstruction.

    The model reads the context a second time, as new tokens over the full cache (teacher forcing; image
    embeddings are fed as they were). The score of a token is the largest weight that any of those queries
    gives it; the highest scores of a row stay, over all layers and heads together.
    Differs from the original: vision tokens only, logical positions, one repeat instead of chunks, no
    written instruction before it (image tokens have no text to say), no protected sinks. A full cache and
    a copy of it exist until the choice is made, and the prefill of the text model costs about three times
    as much. Protocol `within` is the same as `after`: images are compressed before the question is read.
    """

    name = "kvzip"
    joint = True

    def look(self, seen: Seen, runs: Sequence[Run]) -> Observation:
        """Largest weight from any query of the repeated context."""
        first = seen.key.shape[2] - seen.query.shape[2]
        batch, heads, length, _ = seen.key.shape
        best = torch.zeros(batch, heads, length, device=seen.key.device)
        for positions, weights in seen.weights(first):
            real = seen.real(positions - first)[:, None, None, :, None]  # the repeat is padded as the context
            best = torch.maximum(best, (weights * real).amax((2, 3)))
        return Observation(at_runs(best, runs, self.block_size))

    def choose(self, observed: Sequence[Observation], runs: Sequence[Run]) -> list[Tensor]:
        """Keep a row's highest scores over all layers and heads."""
        scores = torch.stack([layer.scores for layer in observed])  # [L, M, H, N]
        return list(top_overall(scores, runs, self.budgets(runs)))

    def _new_cache(self, layout: PromptLayout, config: PreTrainedConfig) -> KVzipCache:
        return KVzipCache(self, layout, config)


class KVzipCache(ObservingCache):
    """Waits, whole, until `repeat_context` (a `ContextRepeater`)."""

    _waiting: dict[int, tuple[Run, ...]] | None = None  # in the copy that the repeat runs over

    def repeat_context(self, run: Callable[[Cache], None], known: Any = None) -> Any:
        """Choose what to keep, by a second reading of the context over a copy of this cache."""
        layers = self.observing_layers
        if self._all_kept or not any(layer.pending for layer in layers.values()):
            return known
        observations: dict[int, Observation | None] = known or self._read(run)
        for index, layer in layers.items():
            layer.observed = observations[index]
        self._thin(list(layers.values()))
        return observations

    def _read(self, run: Callable[[Cache], None]) -> dict[int, Observation | None]:
        layers, fork = self.observing_layers, copy.deepcopy(self)
        fork._waiting = {index: layer.pending for index, layer in layers.items()}
        for layer in fork.observing_layers.values():
            layer.pending = ()
        run(fork)
        return {index: layer.observed for index, layer in fork.observing_layers.items()}

    def observe(
        self, layer_idx: int, query: Tensor, key: Tensor, attention_mask: Tensor | None, scaling: float
    ) -> None:
        """Look at one layer's attention, if it is that of the repeat."""
        if self._waiting is not None and layer_idx in self._waiting:
            seen = Seen(query, key, attention_mask, scaling, self._ledger.plan.pads)
            self.observing_layers[layer_idx].observed = self._method.look(seen, self._waiting[layer_idx])
