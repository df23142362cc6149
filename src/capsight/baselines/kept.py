"""Eviction: the tokens that are kept, packed; each KV head of each block may keep its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from capsight.baselines.base import Baseline
from capsight.baselines.choice import runs_by_row
from capsight.kvcapsule.attention import BlockRows, KeptTokens
from capsight.kvcapsule.attention.native import Source, Steps
from capsight.kvcapsule.codecs import BlockCodec, Payload, RaggedPayload
from capsight.kvcapsule.plan import Run


class EvictingBaseline(Baseline):
    """A baseline that drops tokens: there is no more to attend to than what its caches hold."""

    @property
    def rebuilds(self) -> bool:
        """Whether there is more to attend to than what is stored: no."""
        return False

    def for_latent(self) -> Self:
        """The method as it is: attention can read what each head kept."""
        return self

    def budgets(self, runs: Sequence[Run]) -> dict[int, int]:
        """Tokens to keep of all runs of a row together, by row, in a layer on average."""
        return {row: self.kept * len(indices) for row, indices in runs_by_row(runs).items()}


@dataclass(eq=False)
class KeptPayload(RaggedPayload):
    """What is kept may differ by head: an entry is one token of one head, `counts` is int32 `[M, H]`."""

    def thinned(self, keep: Tensor) -> Self:
        """Only the entries that `keep` (bool `[M, H, N]`), too, names."""
        chosen = keep.transpose(0, 1).flatten()[self.slots(keep.shape[2])]
        return type(self)(
            {
                **{name: self.tensors[name][chosen] for name in ("keys", "values", "kept")},
                "counts": (keep & self.mask(keep.shape[2])).sum(2, dtype=torch.int32),
            }
        )


class KeptCodec(BlockCodec):
    """Keeps all tokens of all blocks; a layer or a subclass throws some away. Evicted tokens are zeros."""

    def __init__(self, name: str, block_size: int) -> None:
        """Set the sizes; `name` is the method's, for messages."""
        super().__init__(block_size)
        self.name = name  # type: ignore[misc]

    def keep(self, keys: Tensor, values: Tensor, runs: Sequence[Run]) -> Tensor:
        """Which tokens of blocks `[M, H, N, D]` to keep: bool `[M, H, N]`."""
        return torch.ones(keys.shape[:3], dtype=torch.bool, device=keys.device)

    def encode_runs(self, keys: Tensor, values: Tensor, runs: Sequence[Run]) -> KeptPayload:
        """Pack the tokens to keep."""
        return KeptPayload.pack(keys, values, self.keep(keys, values, runs))

    def decode(self, payload: Payload) -> tuple[Tensor, Tensor]:
        """Kept tokens in their places, zeros elsewhere."""
        assert isinstance(payload, KeptPayload)
        return payload.spread("keys", self.block_size), payload.spread("values", self.block_size)

    def latent(self, payload: Payload) -> KeptTokens:
        """The kept tokens as they lie in memory."""
        return KeptTokens(*(payload.tensors[name] for name in ("keys", "values", "counts")))

    def source(self, payload: Payload, rows: BlockRows, batch: int, steps: Steps | None = None) -> Source:
        """The kept tokens as they lie in memory."""
        assert isinstance(payload, KeptPayload)
        return payload.source(rows, batch, steps)

    def bias(self, payload: Payload) -> Tensor | None:
        """Minus infinity for evicted tokens: float32 `[M, H, N]`; None where nothing was evicted."""
        assert isinstance(payload, KeptPayload)
        if payload.tensors["kept"].numel() == payload.tensors["counts"].numel() * self.block_size:
            return None
        keep = payload.mask(self.block_size)
        return torch.zeros(keep.shape, device=keep.device).masked_fill(~keep, -torch.inf)
