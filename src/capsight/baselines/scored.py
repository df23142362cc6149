"""Baselines that look at keys, values and positions alone, and keep the tokens that score highest."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

from torch import Tensor
from transformers import PreTrainedConfig

from capsight.baselines.choice import top_per_head
from capsight.baselines.kept import EvictingBaseline, KeptCodec
from capsight.kvcapsule.cache import CapsuleCache, full_attention_layers
from capsight.kvcapsule.plan import Run
from capsight.layout import PromptLayout


class ScoredBaseline(EvictingBaseline):
    """Eviction by a score that needs no queries: tokens are dropped while the layer is prefilled."""

    @abstractmethod
    def scores(self, keys: Tensor, values: Tensor, runs: Sequence[Run]) -> Tensor:
        """Scores of the tokens of M runs, `[M, H, N]`; each head keeps the highest of its row.

        Args:
            keys: `[M, H, N, D]`, after RoPE.
            values: `[M, H, N, D]`.
            runs: where the runs lie, ascending by row, then position.
        """

    def _new_cache(self, layout: PromptLayout, config: PreTrainedConfig) -> CapsuleCache:
        codec = _ScoredCodec(self)
        return CapsuleCache(dict.fromkeys(full_attention_layers(config), codec), layout, config)


class _ScoredCodec(KeptCodec):
    """Keeps what the method's scores say."""

    def __init__(self, method: ScoredBaseline) -> None:
        super().__init__(method.name, method.block_size)
        self._method = method

    def keep(self, keys: Tensor, values: Tensor, runs: Sequence[Run]) -> Tensor:
        if self._method.kept == self.block_size:
            return super().keep(keys, values, runs)
        return top_per_head(self._method.scores(keys, values, runs), runs, self._method.budgets(runs))
