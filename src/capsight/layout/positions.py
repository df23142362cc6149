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
