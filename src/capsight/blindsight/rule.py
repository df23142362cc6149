"""`BaseRule`: what the model itself lets a token see, which every head category is ANDed with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from capsight.errors import OptionError


@dataclass(frozen=True, slots=True)
class BaseRule:
    """The rule of one layer: causal, perhaps within a window, perhaps with two-way image blocks.

    Attributes:
        sliding_window: a query sees no key that is this many tokens or more before it; None: no limit.
        bidirectional_images: the tokens of one vision block also see those that come after them in
            the block (Gemma 3; Gemma 4 if its config says so, the larger ones in sliding layers only). The
            sliding window still holds backwards.

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
        two_way = config.model_type == "gemma3"
        if config.model_type in ("gemma4", "gemma4_unified"):
            # In a forward pass of the unified model two-way images are so in its full layers, too.
            reaches = sliding_window is not None or config.model_type == "gemma4_unified"
            two_way = reaches and config.get_text_config().use_bidirectional_attention == "vision"
        return cls(sliding_window, two_way)


CAUSAL = BaseRule()
"""Plain causal attention."""
