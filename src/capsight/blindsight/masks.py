"""The masks as the definition has them, written out over all pairs of tokens: the oracle.

Nothing fast uses this file; `spans.py` says the same as span arithmetic, and tests hold the two
against each other. What a query at position q may see at position k:

* text query (delimiters included): everything the model's own rule allows.
* query in image i, by category: text that is no delimiter, always; its own image (its delimiters
  included) if the category says so, and for Sink its nearest tokens and its own sinks; the sinks of
  all images if the category says so.

The categories are BlindSight's (arXiv 2507.09071); the formulas are this project's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from capsight.blindsight.categories import Category, MaskOptions
from capsight.blindsight.rule import CAUSAL, BaseRule
from capsight.layout import PromptLayout, RowLayout

_TEXT, _PADDING = -1, -2


@dataclass(frozen=True, slots=True)
class TokenTable:
    """What every token of a row is; all `[S]`.

    Attributes:
        image: int64, the image a vision or delimiter token belongs to; -1 text, -2 padding.
        block: int64, the vision block a vision token lies in; -1 anything else.
        is_sink: bool, the token is a sink of its image.
    """

    image: Tensor
    block: Tensor
    is_sink: Tensor

    @property
    def is_vision(self) -> Tensor:
        """Bool `[S]`: the token lies in a vision block."""
        return self.block >= 0

    @property
    def is_padding(self) -> Tensor:
        """Bool `[S]`: the token is left padding."""
        return self.image == _PADDING


def token_table(row: RowLayout, options: MaskOptions) -> TokenTable:
    """Classify the tokens of a row.

    Args:
        row: the layout of one prompt.
        options: which tokens are sinks.
    """
    image = torch.full((row.length,), _TEXT)  # [S]
    block = torch.full((row.length,), -1)  # [S]
    is_sink = torch.zeros(row.length, dtype=torch.bool)  # [S]
    image[: row.pad_left] = _PADDING
    for index, vision in enumerate(row.blocks):
        delimiters = list(vision.delimiters)
        image[vision.start : vision.end] = image[delimiters] = vision.image
        block[vision.start : vision.end] = index
        if options.sink_delimiters:
            is_sink[delimiters] = True
    for number in range(row.num_images + row.num_videos):
        first = (block >= 0) & (image == number)  # [S]
        is_sink |= first & (first.cumsum(0) <= options.sink_tokens)
    return TokenTable(image, block, is_sink)


def base_mask(row: RowLayout, rule: BaseRule = CAUSAL) -> Tensor:
    """What the model itself allows in one row: bool `[S, S]`, true where query (row) sees key (column).

    Nothing sees padding, and padding sees nothing.
    """
    table = token_table(row, MaskOptions())
    position = torch.arange(row.length)
    distance = position[:, None] - position[None, :]  # [S, S]
    mask = distance >= 0
    if rule.bidirectional_images:
        mask |= (table.block[:, None] == table.block[None, :]) & table.is_vision[:, None]
    if rule.sliding_window is not None:
        mask &= distance < rule.sliding_window
    return mask & ~(table.is_padding[:, None] | table.is_padding[None, :])


def category_mask(row: RowLayout, options: MaskOptions, category: Category) -> Tensor:
    """What a head of this category allows in one row, before the model's own rule: bool `[S, S]`."""
    table = token_table(row, options)
    text_key = (table.image == _TEXT)[None, :]  # [1, S]
    own_image = table.image[:, None] == table.image[None, :]  # [S, S]
    seen = text_key.expand_as(own_image).clone()
    if category is Category.DENSE:
        seen[:] = True
    elif category.sees_own_image:
        seen |= own_image
    else:
        position = torch.arange(row.length)
        near = (position[:, None] - position[None, :]).abs() < options.own_window
        seen |= own_image & near
    if category.sees_sinks:
        seen |= table.is_sink[None, :]
    return seen | ~table.is_vision[:, None]


def reference_mask(
    layout: PromptLayout, options: MaskOptions, category: Category, rule: BaseRule = CAUSAL
) -> Tensor:
    """The full mask of a batch: the category ANDed with the model's own rule.

    Args:
        layout: B rows of S tokens.
        options: which tokens are sinks.
        category: of the head.
        rule: of the layer.

    Returns:
        bool `[B, S, S]`, true where the query (second axis) sees the key (third axis). Rows and
        columns of padding are false.
    """
    return torch.stack([base_mask(row, rule) & category_mask(row, options, category) for row in layout.rows])
