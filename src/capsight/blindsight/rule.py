"""`BaseRule`: what the model itself lets a token see, which every head category is ANDed with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from capsight.errors import OptionError

BIDIRECTIONAL_IMAGES: frozenset[str] = frozenset({"gemma3"})
"""`config.model_type` of the models whose image blocks attend to themselves in both directions."""


@dataclass(frozen=True, slots=True)
class BaseRule:
    """The rule of one layer: causal, perhaps within a window, perhaps with two-way image blocks.

    Attributes:
        sliding_window: a query sees no key that is this many tokens or more before it; None: no limit.
        bidirectional_images: the tokens of one vision block also see those that come after them in
            the block (Gemma 3). The sliding window still holds backwards.

    Raises:
        OptionError: the window is less than 1.
    """

    sliding_window: int | None = None
    bidirectional_images: bool = False

    def __post_init__(self) -> None:
        """Check the range."""
        if self.sliding_window is not None and self.sliding_window < 1:
            raise OptionError(f"sliding_window must be 1 or more, or None, not {self.sliding_window}")

    @classmethod
    def of(cls, config: Any, sliding_window: int | None = None) -> BaseRule:
        """The rule of a layer of a transformers model.

        Args:
            config: the config of the whole vision-language model.
            sliding_window: what the layer passes to its attention function under that name.
        """
        return cls(sliding_window, config.model_type in BIDIRECTIONAL_IMAGES)


CAUSAL = BaseRule()
"""Plain causal attention."""
