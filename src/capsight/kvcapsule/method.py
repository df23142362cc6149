"""What the runtime asks of a compression method and of its caches; `KVCapsule` is one of several methods."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache

from capsight.layout import PromptLayout


class CacheMethod(Protocol):
    """A way to keep the KV cache of vision tokens small: hand it to `capsight.enable`.

    Its caches say `nbytes`, `nbytes_full` and the logical `get_seq_length()`, and can be cropped and
    have their rows repeated.
    """

    @property
    def name(self) -> str:
        """The name by which tables and options call the method."""
        ...

    @property
    def needs_attention(self) -> bool:
        """Whether its caches need capsight's attention function (`key_bias`, `observe`)."""
        ...

    @property
    def module_nbytes(self) -> int:
        """Bytes of what was learnt, resident once per model."""
        ...

    def cache(self, inputs: Mapping[str, Any] | PromptLayout, config: PreTrainedConfig) -> Cache:
        """An empty cache for a batch of prompts: processor outputs, or the layout made of them."""
        ...

    def check_model(self, model: Any) -> None:
        """Refuse a model that the method was not fitted to, or cannot run on.

        Raises:
            CapsightError: it is.
        """
        ...


@runtime_checkable
class LatentMethod(CacheMethod, Protocol):
    """A method whose caches can leave capsules to an attention function that reads them as they are."""

    @property
    def rebuilds(self) -> bool:
        """Whether there is more to attend to than what is stored; if not, reading that alone is faster."""
        ...

    def for_latent(self) -> CacheMethod:
        """The method as it is best attended to so.

        Raises:
            CapsightError: it cannot be.
        """
        ...


@runtime_checkable
class QueryObserver(Protocol):
    """A cache that chooses what to keep by attention, so it has to see queries."""

    def observe(
        self, layer_idx: int, query: Tensor, key: Tensor, attention_mask: Tensor | None, scaling: float
    ) -> None:
        """Look at one layer's attention, right after `update` and before the next layer.

        Args:
            layer_idx: the layer.
            query: `[B, Hq, Q, D]`, the last Q of S tokens.
            key: `[B, H, S, D]`, as `update` returned them.
            attention_mask: bool or additive `[B, 1 or Hq, Q, S]`; None means causal.
            scaling: factor on the scores.
        """
        ...


@runtime_checkable
class ContextRepeater(Protocol):
    """A cache that is compressed after the model has read the whole context a second time."""

    def repeat_context(self, run: Callable[[Cache], None], known: Any = None) -> Any:
        """Choose what to keep.

        Args:
            run: feeds the prefilled context once more, as new tokens, to a model with the given cache.
            known: what the second reading showed for another budget of the same method, with the same
                prompts; then there is none.

        Returns:
            What the second reading showed, for other budgets.
        """
        ...


def for_model(method: CacheMethod, model: Any) -> CacheMethod:
    """The method for a model in hand, which `check_model` takes; see `KVCapsule.for_model`."""
    adapt = getattr(method, "for_model", None)
    return method if adapt is None else adapt(model)


def reads_latent(method: object) -> bool:
    """Whether attention is best left to read a method's capsules as they are."""
    return isinstance(method, LatentMethod) and not method.rebuilds
