"""Random input of attention over capsules, plain tensors without a cache."""

from __future__ import annotations

from typing import NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

from capsight.kvcapsule.attention import BlockRows, LatentBlocks, TokenMap

SCALING = 0.5


class Problem(NamedTuple):
    """Arguments of `latent_attention`; every query sees itself and the exact tokens before it."""

    query: Tensor
    keys: Tensor
    values: Tensor
    blocks: LatentBlocks
    rows: BlockRows
    mask: Tensor | None
    scaling: float = SCALING

    def to(self, device: str, dtype: torch.dtype) -> Problem:
        """What a cache of `dtype` would give; weights as they are."""
        query, keys, values = (x.to(device, dtype) for x in self[:3])
        held, rows = self.blocks, self.rows
        blocks = LatentBlocks(
            held.keys.to(device, dtype),
            held.values.to(device, dtype),
            *(
                TokenMap(
                    m.copied, *(None if x is None else x.to(device) for x in (m.weights, m.rest, m.mean))
                )
                for m in (held.key_map, held.value_map)
            ),
        )
        where = BlockRows(rows.rows.to(device), rows.ranks.to(device), rows.most)
        mask = None if self.mask is None else self.mask.to(device)
        return Problem(query, keys, values, blocks, where, mask)


@st.composite
def problems(draw: st.DrawFn, head_dim: int = 5) -> Problem:
    """Rows with different numbers of blocks, also none; all kinds of maps; bool, additive or no mask."""
    counts = draw(st.lists(st.integers(0, 3), min_size=1, max_size=3).filter(any))
    heads, group, new = draw(st.tuples(st.integers(1, 3), st.integers(1, 2), st.integers(1, 3)))
    slots, rebuilt, exact = draw(st.tuples(st.integers(1, 4), st.integers(0, 4), st.integers(0, 4)))
    copied, shared, means = draw(st.tuples(st.booleans(), st.booleans(), st.booleans()))
    basis = draw(st.booleans())  # values in a basis beside keys that are copied, as the static codec has them
    g = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    batch, blocks = len(counts), sum(counts)
    copied = copied or not rebuilt

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    def token_map(copied: bool, size: int) -> TokenMap:
        of = 1 if shared else blocks
        rest, mean = (random(of, size), random(heads, head_dim)) if means else (None, None)
        return TokenMap(copied, random(of, size, slots), rest, mean) if size else TokenMap()

    key_map = token_map(copied, rebuilt)
    value_map = token_map(False, slots + rebuilt) if copied and basis else token_map(copied, rebuilt)
    held = LatentBlocks(
        random(blocks, slots, heads, head_dim), random(blocks, slots, heads, head_dim), key_map, value_map
    )
    owner = torch.tensor([b for b, count in enumerate(counts) for _ in range(count)])
    rank = torch.tensor([i for count in counts for i in range(count)])
    keys, values = (random(batch, heads, exact + new, head_dim) for _ in range(2))
    mask = torch.ones(new, exact + new, dtype=torch.bool).tril(exact).expand(batch, 1, -1, -1)
    kind = draw(st.sampled_from(["bool", "additive", "none"]))
    if kind == "additive":
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    return Problem(
        random(batch, heads * group, new, head_dim),
        keys,
        values,
        held,
        BlockRows(owner, rank, max(counts)),
        None if kind == "none" else mask,
    )
