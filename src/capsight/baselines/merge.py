"""Token-axis merging: neighbouring vision tokens become their mean."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from capsight.baselines.base import Baseline
from capsight.kvcapsule.cache import CapsuleCache, full_attention_layers
from capsight.kvcapsule.codecs import BlockCodec, Payload
from capsight.kvcapsule.plan import DEFAULT_BLOCK_SIZE, Run
from capsight.layout import PromptLayout


class TokenMerging(Baseline):
    """Mean pooling of r groups of neighbours in each run; cf. token merging, https://arxiv.org/abs/2210.09461.

    Differs from token merging: groups are neighbours in reading order instead of matched by similarity,
    keys and values of the cache are averaged instead of hidden states, and keys are averaged after RoPE.
    A merged token stands at the middle of its group; with `log_count` the log of the group's size is
    added to its attention score ("proportional attention" there).
    """

    name = "merge"

    def __init__(
        self, retained: float = 0.40, block_size: int = DEFAULT_BLOCK_SIZE, log_count: bool = True
    ) -> None:
        """Choose the budget, and whether a merged token counts for as many as it stands for."""
        super().__init__(retained, block_size)
        self.log_count = log_count

    def _new_cache(self, layout: PromptLayout, config: PreTrainedConfig) -> CapsuleCache:
        codec = MergeCodec(self.block_size, self.kept, self.log_count)
        return CapsuleCache(dict.fromkeys(full_attention_layers(config), codec), layout, config)


class MergeCodec(BlockCodec):
    """Stores the means of r groups, `[M, r, H, D]`."""

    name = TokenMerging.name

    def __init__(self, block_size: int, kept: int, log_count: bool) -> None:
        """Cut a run of `block_size` tokens into `kept` groups whose sizes differ by one at most."""
        super().__init__(block_size)
        edges = [round(i * block_size / kept) for i in range(kept + 1)]
        self._sizes = [b - a for a, b in pairwise(edges)]
        self._middles = [(a + b - 1) // 2 for a, b in pairwise(edges)]
        self._log_count = log_count

    def encode_runs(self, keys: Tensor, values: Tensor, runs: Sequence[Run]) -> Payload:
        """Average every group."""
        return Payload({"keys": self._mean(keys), "values": self._mean(values)})

    def decode(self, payload: Payload) -> tuple[Tensor, Tensor]:
        """Each mean at the middle of its group, zeros elsewhere."""
        return self._spread(payload.tensors["keys"]), self._spread(payload.tensors["values"])

    def bias(self, payload: Payload) -> Tensor | None:
        """Log of the group's size at its middle, minus infinity elsewhere: float32 `[M, 1, N]`, or None."""
        if len(self._sizes) == self.block_size:
            return None
        means = payload.tensors["keys"]
        bias = torch.full((len(means), 1, self.block_size), -torch.inf, device=means.device)
        sizes = torch.tensor(self._sizes, dtype=torch.float32, device=means.device)
        bias[:, :, self._middles] = sizes.log() if self._log_count else torch.zeros_like(sizes)
        return bias

    def _mean(self, x: Tensor) -> Tensor:
        groups = x.transpose(1, 2).split(self._sizes, 1)  # r of [M, g, H, D]
        return torch.stack([group.mean(1) for group in groups], 1)

    def _spread(self, means: Tensor) -> Tensor:
        full = means.new_zeros(means.shape[0], self.block_size, *means.shape[2:])
        full[:, self._middles] = means
        return full.transpose(1, 2)
