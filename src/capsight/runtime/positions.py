"""Gives a model the positions that a cache's own conversation calls for, whatever the model saw last.

Qwen's models keep the offset of M-RoPE on themselves, where the next conversation overwrites it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from capsight.cache_argument import cache_of
from capsight.kvcapsule import CapsuleCache
from capsight.layout.positions import position_ids, text_position_ids
from capsight.runtime.compiled import is_step
from capsight.runtime.state import current_state


@contextmanager
def positions_of_caches(model: Any) -> Iterator[None]:
    """Inside the block the text model numbers the tokens that go to a `CapsuleCache` by that cache's layout.

    It is a forward hook, which every kind of call goes through: `generate`, pipelines, one's own loop.
    """
    hook = model.get_decoder().register_forward_pre_hook(_Numbering(model.config), with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


class _Numbering:
    """The hook; a class, so that a model can be pickled while it is enabled."""

    def __init__(self, config: Any) -> None:
        self._config = config

    def __call__(self, module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        if is_step(kwargs):
            return None
        cache, given = cache_of(kwargs), kwargs.get("inputs_embeds")
        if not isinstance(cache, CapsuleCache) or given is None or current_state().generating:
            return None
        seen = cache.get_seq_length()
        layout = cache.layout.continued(seen, seen + given.shape[1]) if seen else None
        if layout is None or len(given) % layout.batch_size:
            return None
        layout, mask = layout.repeat(len(given) // layout.batch_size), kwargs.get("attention_mask")
        if isinstance(mask, Tensor) and mask.shape == (len(given), layout.length):
            positions = text_position_ids(layout, self._config, mask)
            positions = None if positions is None else positions[..., seen:]
        else:
            positions = position_ids(layout, self._config, seen)
        if positions is None:
            return None
        return args, kwargs | {"position_ids": positions.to(given.device)}
