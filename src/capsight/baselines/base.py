"""`Baseline`: what a user would pick instead of KVCapsule, behind the interface that KVCapsule has."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Self

from transformers import PreTrainedConfig
from transformers.cache_utils import Cache

from capsight.kvcapsule.budget import share_to_keep
from capsight.kvcapsule.calibration.fit import kept_tokens
from capsight.kvcapsule.plan import DEFAULT_BLOCK_SIZE
from capsight.layout import PromptLayout, build_layout


class Baseline(ABC):
    """A compression method for the KV cache of vision tokens; a `CacheMethod` for `capsight.enable`.

    All baselines spend the bytes that KVCapsule spends at the same `retained`: r tokens' worth for each
    run of N vision tokens, text and block tails exact (see `CapsulePlan`). How a method spreads them over
    the runs of a row, the KV heads and the layers is its own affair. Positions stay logical.

    Attributes:
        name: the name by which tables and options call the method.
        needs_attention: whether capsight's attention function must run (evicted tokens, log counts).
        calibrated: whether the method is made by `fit(model, processor, samples)`.
        retained: fraction of the vision tokens' bytes to keep, in (0, 1].
        block_size: vision tokens in a run (N).
    """

    name: ClassVar[str]
    needs_attention: ClassVar[bool] = True
    calibrated: ClassVar[bool] = False

    def __init__(self, retained: float = 0.40, block_size: int = DEFAULT_BLOCK_SIZE) -> None:
        """Choose the budget.

        Raises:
            OptionError: `retained` is not in (0, 1], or `block_size` is less than 2.
        """
        kept_tokens(retained, block_size)
        self.retained, self.block_size = retained, block_size

    @property
    def kept(self) -> int:
        """Tokens' worth of numbers kept of each run (r)."""
        return kept_tokens(self.retained, self.block_size)

    @property
    def label(self) -> str:
        """Name and budget, for tables."""
        return f"{self.name} {self.retained:g}"

    @property
    def module_nbytes(self) -> int:
        """Bytes of what was learnt, resident once per model."""
        return 0

    def with_retained(self, retained: float | None = None, *, compression_ratio: float | None = None) -> Self:
        """This method with another budget; shares what was learnt. `compression_ratio` is 1 - retained.

        Raises:
            OptionError: `retained` is not in (0, 1], or both are given.
        """
        retained = share_to_keep(retained, compression_ratio)
        kept_tokens(retained, self.block_size)
        other = copy.copy(self)
        other.retained = retained
        return other

    def check_model(self, model: Any) -> None:
        """Refuse a model that the method was not fitted to or cannot run on; here: none.

        Raises:
            CapsightError: it is such a model.
        """
        return

    def cache(self, inputs: Mapping[str, Any] | PromptLayout, config: PreTrainedConfig) -> Cache:
        """An empty cache for a batch of prompts.

        Args:
            inputs: processor outputs, or the layout made of them.
            config: the model's config.

        Raises:
            LayoutError: the inputs do not form a layout.
        """
        layout = inputs if isinstance(inputs, PromptLayout) else build_layout(inputs, config)
        return self._new_cache(layout, config)

    @abstractmethod
    def _new_cache(self, layout: PromptLayout, config: PreTrainedConfig) -> Cache:
        """An empty cache for prompts of `layout`."""
