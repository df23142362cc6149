"""SnapKV-style eviction: what the last window of queries attends to, pooled (arXiv 2404.14469)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn.functional import avg_pool1d

from capsight.baselines.choice import top_per_head
from capsight.baselines.observing import Observation, ObservingBaseline, at_runs
from capsight.baselines.seen import Seen
from capsight.kvcapsule.plan import Run

WINDOW = 32  # observing queries
KERNEL = 5  # tokens over which scores are averaged


class SnapKV(ObservingBaseline):
    """After SnapKV, https://arxiv.org/abs/2404.14469: attention of the last 32 queries, pooled over 5 tokens.

    Differs from the original: vision tokens only, logical positions, and the window is the last prefilled
    tokens, which in protocol `after` are image tokens and not the question. Tokens inside the window are
    not kept for certain: they are scored by the queries that can see them, like all others. Query heads
    of a KV head are averaged, as in kvpress.
    """

    name = "snapkv"
    joint = False

    def look(self, seen: Seen, runs: Sequence[Run]) -> Observation:
        """Pooled mean attention of the last window."""
        first = max(seen.key.shape[2] - WINDOW, 0)
        mean = seen.mean([first] * seen.key.shape[0])  # [B, H, S]
        pooled = avg_pool1d(mean, KERNEL, stride=1, padding=KERNEL // 2, count_include_pad=False)
        return Observation(at_runs(pooled, runs, self.block_size))

    def choose(self, observed: Sequence[Observation], runs: Sequence[Run]) -> list[Tensor]:
        """Each head keeps its highest scores of a row."""
        return [top_per_head(layer.scores, runs, self.budgets(runs)) for layer in observed]
