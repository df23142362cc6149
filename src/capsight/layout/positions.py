"""Rotary positions as a function of the layout: what each token of a prompt gets, and what comes after it.

A model's own `rope_deltas` belong to whichever prompt it saw last; these belong to the layout.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from capsight.layout.families import family_for
from capsight.layout.prompt_layout import PromptLayout


def rope_positions(layout: PromptLayout, config: Any) -> Tensor:
    """Positions of all tokens of a batch of prompts, as the model itself numbers them in one prefill.

    Args:
        layout: of the prompts.
        config: the config of the whole vision-language model.

    Returns:
        int64 `[3, B, S]`, time, height and width; the three are alike for text, and for every token of
        a family whose RoPE has one dimension. 0 in the padding.

    Raises:
        UnsupportedModelError: no adapter knows `config.model_type`.
    """
    family = family_for(config)
    rows = [family.row_positions(row, config) for row in layout.rows]
    return torch.from_numpy(np.stack(rows, 1))


def rope_deltas(layout: PromptLayout, config: Any) -> Tensor:
    """What has to be added to a token's index to get its position, for tokens generated after the prompts.

    They go on where text in the prompt would, as in `model.generate`. A model's own attribute goes on
    after the highest position instead: another one after a video that lasts longer than its sides are
    long, if less text than that follows.

    Returns:
        int64 `[B, 1]`; the index of a token does not count padding. 0 where RoPE has one dimension.

    Raises:
        UnsupportedModelError: no adapter knows `config.model_type`.
    """
    ends = rope_positions(layout.extended(1), config)[0, :, -1:]
    return ends - torch.tensor([[row.length - row.pad_left] for row in layout.rows])


def positions_after(layout: PromptLayout, config: Any, new: int) -> Tensor:
    """Positions of `new` tokens generated after the prompts: int64 `[3, B, new]`, all three rows alike.

    Raises:
        UnsupportedModelError: no adapter knows `config.model_type`.
    """
    return rope_positions(layout.extended(new), config)[..., layout.length :]


def position_ids(layout: PromptLayout, config: Any, start: int = 0) -> Tensor | None:
    """The `position_ids` to give a model for the tokens from `start` on, where it needs to be told.

    Returns:
        int64 `[4, B, S - start]`: the index without padding, then `rope_positions`. None for families
        whose models number their tokens by index and need nothing but the attention mask.

    Raises:
        UnsupportedModelError: no adapter knows `config.model_type`.
    """
    if family_for(config).position_rows == 1:
        return None
    pads = torch.tensor([[row.pad_left] for row in layout.rows])
    index = (torch.arange(layout.length) - pads).clamp_min(0)
    return torch.cat((index[None], rope_positions(layout, config)))[..., start:]


def text_position_ids(layout: PromptLayout, config: Any, mask: Tensor) -> Tensor | None:
    """`position_ids` of prompts that go on with text, where not every token need count.

    Args:
        layout: of the prompts.
        config: the config of the whole vision-language model.
        mask: `[B, S + new]`, 0 for padding, also between the prompts and the text.

    Returns:
        As `position_ids`, int64 `[4, B, S + new]` on the CPU; right for the last `new` tokens.

    Raises:
        UnsupportedModelError: no adapter knows `config.model_type`.
    """
    if family_for(config).position_rows == 1:
        return None
    index = (mask.cpu().long().cumsum(-1) - 1).clamp_min(0)
    return torch.cat((index[None], (index + rope_deltas(layout, config)).expand(3, -1, -1)))
