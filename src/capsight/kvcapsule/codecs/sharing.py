"""How many tokens each block keeps, where the blocks of a prompt share them (our design)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from capsight.errors import OptionError

Share = Literal["block", "prompt"]
SHARES: tuple[Share, ...] = ("block", "prompt")
"""What shares the kept tokens: every block has r of its own, or those of a prompt have r on average."""

LEAST = 0.25
"""Of r, what every block keeps at least."""


def shared_counts(energy: Tensor, blocks: Sequence[int], kept: int) -> Tensor:
    """Share r = `kept` tokens a block out over the blocks of each row.

    A token is worth the residual energy it was chosen for, or the least of those chosen before it in its
    block; so what a block keeps is the beginning of its greedy choice. The tokens of a row that are worth
    most are kept, and of every block the first `max(1, int(LEAST * r))`.

    Args:
        energy: float `[M, N]`, residual energy of all tokens of a block in the order of choice.
        blocks: number of blocks of each row, M in all, rows one after another.
        kept: tokens kept of a block on average (r), at most N.

    Returns:
        int64 `[M]`; of a row with m blocks, m * r together.
    """
    worth = energy.cummin(1).values
    worth[:, : max(1, int(LEAST * kept))] = torch.inf
    counts = []
    for row in worth.split(list(blocks)):
        best = row.flatten().topk(len(row) * kept).indices
        counts.append(torch.bincount(best // row.shape[1], minlength=len(row)))
    return torch.cat(counts)


def check_share(share: Any) -> Share:
    """Refuse what is not a way to share.

    Raises:
        OptionError: it is neither "block" nor "prompt".
    """
    if share not in SHARES:
        raise OptionError(f"share must be one of {list(SHARES)}, not {share!r}")
    return SHARES[SHARES.index(share)]
