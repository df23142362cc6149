"""Baselines that choose by attention: all vision tokens stay until the queries of the prefill were seen."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from capsight.baselines.kept import EvictingBaseline, KeptCodec, KeptPayload
from capsight.baselines.seen import Seen
from capsight.errors import CapsightError
from capsight.kvcapsule.cache import CapsuleCache, full_attention_layers
from capsight.kvcapsule.cache.layer import CapsuleLayer
from capsight.kvcapsule.plan import Run
from capsight.layout import PromptLayout


@dataclass(frozen=True, slots=True)
class Observation:
    """What one layer's attention says about its vision tokens.

    Attributes:
        scores: float32 `[M, H, N]`.
        density: float32 `[B]`, what share of the scores a row's queries need; None where not asked for.
    """

    scores: Tensor
    density: Tensor | None = None


class ObservingBaseline(EvictingBaseline):
    """Eviction by attention. Outside `capsight.enable` such a cache is refused after its prefill.

    Protocol `after` compresses before any question is there, so what these methods can look at is the
    attention of the last prefilled tokens: the images' own and the delimiters that follow them.

    Attributes:
        joint: whether the choice needs the attention of all layers (a full cache until the last layer).
    """

    joint: ClassVar[bool]

    @abstractmethod
    def look(self, seen: Seen, runs: Sequence[Run]) -> Observation:
        """Score the tokens of M runs by one layer's attention."""

    @abstractmethod
    def choose(self, observed: Sequence[Observation], runs: Sequence[Run]) -> Sequence[Tensor]:
        """What to keep in each of the layers observed: bool `[M, H, N]` each."""

    def _new_cache(self, layout: PromptLayout, config: PreTrainedConfig) -> ObservingCache:
        return ObservingCache(self, layout, config)


class ObservingLayer(CapsuleLayer):
    """A layer whose newest runs wait, whole, for the queries that decide what is kept of them.

    Attributes:
        pending: runs stored by the last update and not decided on.
        observed: what was seen of them.
    """

    pending: tuple[Run, ...]
    observed: Observation | None

    def reset(self) -> None:
        """Drop all that is stored."""
        super().reset()
        self.pending, self.observed = (), None

    def _store(self, keys: Tensor, values: Tensor) -> None:
        known = () if self.placement is None else self.placement.runs
        super()._store(keys, values)
        assert self.placement is not None
        stored = set(known)
        self.pending = tuple(run for run in self.placement.runs if run not in stored)

    def thin(self, keep: Tensor) -> None:
        """Keep of the pending runs only what `keep` (bool `[M, H, N]`) names."""
        assert isinstance(self.payload, KeptPayload)
        assert self.placement is not None
        mask = self.payload.mask(self.codec.block_size)
        waiting = set(self.pending)
        fresh = [index for index, run in enumerate(self.placement.runs) if run in waiting]
        mask[fresh] = keep
        self.payload = self.payload.thinned(mask)
        self.pending, self.observed = (), None


class ObservingCache(CapsuleCache):
    """A capsule cache that is shown every layer's queries (`QueryObserver`)."""

    _layer_class = ObservingLayer

    def __init__(self, method: ObservingBaseline, layout: PromptLayout, config: PreTrainedConfig) -> None:
        """Make an empty cache; `method` chooses what is kept."""
        codec = KeptCodec(method.name, method.block_size)
        super().__init__(dict.fromkeys(full_attention_layers(config), codec), layout, config)
        self._method = method

    @property
    def observing_layers(self) -> dict[int, ObservingLayer]:
        """The layers that hold vision tokens, by layer index."""
        return {i: layer for i, layer in self.capsule_layers.items() if isinstance(layer, ObservingLayer)}

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Add `[B, H, Q, D]` new tokens of one layer; see `CapsuleCache`.

        Raises:
            CapsightError: the queries of the last prefill were not shown to the cache.
        """
        layer = self.layers[layer_idx]
        if isinstance(layer, ObservingLayer) and layer.pending and not self._all_kept:
            raise CapsightError(
                f"the {self._method.name} method has not seen the prefill's queries; generate inside "
                "capsight.enable(model, capsule=...)"
            )
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def observe(
        self, layer_idx: int, query: Tensor, key: Tensor, attention_mask: Tensor | None, scaling: float
    ) -> None:
        """Look at one layer's attention; drop tokens as soon as the method can say which."""
        layer = self.layers[layer_idx]
        if not isinstance(layer, ObservingLayer) or not layer.pending or self._all_kept:
            return
        seen = Seen(query, key, attention_mask, scaling, self._ledger.plan.pads)
        layer.observed = self._method.look(seen, layer.pending)
        if not self._method.joint:
            self._thin([layer])
        elif layer_idx == max(self.observing_layers):
            self._thin(list(self.observing_layers.values()))

    def _thin(self, layers: Sequence[ObservingLayer]) -> None:
        observed = [layer.observed for layer in layers if layer.observed is not None]
        for layer, keep in zip(layers, self._method.choose(observed, layers[0].pending), strict=True):
            layer.thin(keep)

    @property
    def _all_kept(self) -> bool:
        return self._method.kept == self._method.block_size


def at_runs(scores: Tensor, runs: Sequence[Run], size: int) -> Tensor:
    """The scores `[B, H, S]` of the tokens of `runs`: `[M, H, N]` with N = `size`."""
    return torch.stack([scores[row, :, start : start + size] for row, start, *_ in runs])
