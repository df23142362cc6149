"""`PagedCapsules`: what the vLLM plugin keeps, as a method for transformers, to judge and test it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from capsight.baselines.base import Baseline
from capsight.baselines.kept import KeptCodec
from capsight.kvcapsule.cache import CapsuleCache, full_attention_layers
from capsight.kvcapsule.plan import Run
from capsight.layout import PromptLayout, RowLayout
from capsight.serving.plan import RequestPlan, plan_request
from capsight.serving.select import select_tokens


class PagedCodec(KeptCodec):
    """Image tokens one by one; those of a row compete."""

    def __init__(self, plans: Sequence[RequestPlan | None]) -> None:
        """Take a plan for each row of a batch."""
        super().__init__("paged", 1)
        self._plans = tuple(plans)

    def keep(self, keys: Tensor, values: Tensor, runs: Sequence[Run]) -> Tensor:
        """Which tokens of blocks `[M, H, 1, D]` to keep: bool `[M, H, 1]`."""
        keep = super().keep(keys, values, runs)  # [T, H, 1]
        done = 0
        for row, plan in enumerate(self._plans):
            tokens = sum(run.length for run in runs if run.row == row)
            if plan is not None and tokens:
                images = slice(done, done + plan.image_tokens)  # the others end in a block that is not full
                key, value = (x[images, :, 0].transpose(0, 1) for x in (keys, values))
                keep[images] = self.chosen(key, value, plan).T[:, :, None]
            done += tokens
        return keep

    def chosen(self, keys: Tensor, values: Tensor, plan: RequestPlan) -> Tensor:
        """Which of a row's image tokens `[H, T, D]` to keep: bool `[H, T]`."""
        positions = select_tokens(keys, values, plan.kept_image_tokens, plan.sizes)
        return torch.zeros_like(keys[:, :, 0], dtype=torch.bool).scatter(1, positions, True)


class PagedCapsules(Baseline):
    """Each KV head of each layer keeps equally many image tokens of a prompt, as whole blocks of memory hold.

    Blocks are those of an engine's paged memory, counted from the first token of a prompt (see
    `plan_request`); with the same `retained` and block size the engine keeps the very same tokens.
    """

    name = "paged"
    codec: type[PagedCodec] = PagedCodec

    def __init__(self, retained: float = 0.40, block_size: int = 32) -> None:
        """Choose the share of image tokens to keep and the engine's block size."""
        super().__init__(retained, block_size)

    def plan(self, row: RowLayout) -> RequestPlan | None:
        """How the blocks of one prompt shrink."""
        pad = row.pad_left
        ranges = [(block.start - pad, block.end - 1 - pad) for block in row.blocks]
        return plan_request(ranges, row.length - pad, self.block_size, self.retained)

    def _new_cache(self, layout: PromptLayout, config: PreTrainedConfig) -> CapsuleCache:
        codec = self.codec([self.plan(row) for row in layout.rows])
        return CapsuleCache(dict.fromkeys(full_attention_layers(config), codec), layout, config)
