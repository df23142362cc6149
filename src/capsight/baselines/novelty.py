"""Novelty-based eviction: KVCapsule's own selection, and nothing rebuilt (the `evict` codec)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Self

from transformers import PreTrainedConfig

from capsight.baselines.base import Baseline
from capsight.kvcapsule.cache import CapsuleCache
from capsight.kvcapsule.capsule import KVCapsule
from capsight.kvcapsule.plan import DEFAULT_BLOCK_SIZE
from capsight.layout import PromptLayout


class NoveltyEviction(Baseline):
    """The control for KVCapsule's rebuilding: the tokens that `adaptive` keeps, the rest evicted (ours).

    It keeps the tokens that the others of their run predict worst; see `kvcapsule.codecs.adaptive`.
    """

    name = "evict"
    calibrated = True

    def __init__(self, capsule: KVCapsule) -> None:
        """Use a fitted `adaptive` or `evict` capsule.

        Raises:
            OptionError: it is of another codec.
        """
        super().__init__(capsule.retained, capsule.info.block_size)
        self._capsule = capsule.with_codec("evict")

    @classmethod
    def fit(
        cls,
        model: Any,
        processor: Any,
        samples: Iterable[Any],
        retained: float = 0.40,
        block_size: int = DEFAULT_BLOCK_SIZE,
        progress: bool = True,
    ) -> Self:
        """Fit the selection; arguments and errors are those of `KVCapsule.fit`."""
        return cls(KVCapsule.fit(model, processor, samples, retained, "evict", block_size, progress=progress))

    @property
    def module_nbytes(self) -> int:
        """Bytes of the second moments that the selection works with."""
        return self._capsule.module_nbytes

    def check_model(self, model: Any) -> None:
        """Refuse a model other than the one the selection was fitted to."""
        self._capsule.check_model(model)

    def _new_cache(self, layout: PromptLayout, config: PreTrainedConfig) -> CapsuleCache:
        return self._capsule.with_retained(self.retained).cache(layout, config)
