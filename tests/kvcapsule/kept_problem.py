"""Random tokens that heads keep for themselves, and plain softmax attention over them row by row."""

from __future__ import annotations

from typing import NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

from capsight.kvcapsule.attention import BlockRows, KeptTokens, latent_attention

D, SCALING = 5, 0.4


class Problem(NamedTuple):
    """Arguments of `latent_attention`."""

    query: Tensor
    keys: Tensor
    values: Tensor
    kept: KeptTokens
    rows: BlockRows
    mask: Tensor | None

    def to(self, dtype: torch.dtype) -> Problem:
        """The same numbers in another dtype; an additive mask, too."""
        held = KeptTokens(self.kept.keys.to(dtype), self.kept.values.to(dtype), self.kept.counts)
        mask = self.mask if self.mask is None or self.mask.dtype == torch.bool else self.mask.to(dtype)
        return Problem(*(x.to(dtype) for x in self[:3]), held, self.rows, mask)

    def attend(self) -> Tensor:
        return latent_attention(*self, SCALING)

    def plain(self) -> Tensor:
        """Softmax over the exact tokens that are seen and all that is kept, in float64: `[B, Q, Hq, D]`."""
        batch, query_heads, queries, _ = self.query.shape
        heads, exact = self.keys.shape[1:3]
        owned, at = {}, 0
        for head in range(heads):
            for block, row in enumerate(self.rows.rows.tolist()):
                own = slice(at, at := at + int(self.kept.counts[block, head]))
                owned.setdefault((row, head), []).append((self.kept.keys[own], self.kept.values[own]))
        assert at == len(self.kept.keys)
        out = []
        for row in range(batch):
            for head in range(query_heads):
                mine = head // (query_heads // heads)
                parts = [(self.keys[row, mine], self.values[row, mine]), *owned.get((row, mine), [])]
                keys, values = (torch.cat([part[i] for part in parts]).double() for i in (0, 1))
                scores = SCALING * self.query[row, head].double() @ keys.T
                if self.mask is not None:
                    own = self.mask.expand(batch, query_heads, -1, -1)[row, head]
                    hidden = ~own if own.dtype == torch.bool else own < -1e4
                    scores[:, :exact] = scores[:, :exact].masked_fill(hidden, -torch.inf)
                    if own.dtype != torch.bool:
                        scores[:, :exact] += own.masked_fill(hidden, 0).double()
                out.append(scores.softmax(-1) @ values)
        return torch.stack(out).view(batch, query_heads, queries, D).transpose(1, 2)


def problem(
    counts: list[list[list[int]]], group: int, queries: int, exact: int, seed: int, mask: str = "none"
) -> Problem:
    """Random numbers.

    Args:
        counts: what each head of each block of each row keeps.
        group: query heads to a KV head.
        queries: new tokens (Q).
        exact: exact tokens before them.
        seed: of the numbers.
        mask: one of `MASKS`; it differs by row or by query head where its name says so.
    """
    g = torch.Generator().manual_seed(seed)
    batch, heads = len(counts), max((len(block) for row in counts for block in row), default=2)
    of_blocks = [block for row in counts for block in row]
    total = sum(sum(block) for block in of_blocks)
    keys, values = torch.randn(2, batch, heads, exact + queries, D, generator=g)
    rows = torch.tensor([row for row, own in enumerate(counts) for _ in own], dtype=torch.int64)
    ranks = torch.tensor([rank for own in counts for rank in range(len(own))], dtype=torch.int64)
    held = KeptTokens(
        torch.randn(total, D, generator=g),
        torch.randn(total, D, generator=g),
        torch.tensor(of_blocks, dtype=torch.uint8 if total < 256 else torch.int32).view(-1, heads),
    )
    seen, kind, *of = None, *mask.split()
    if kind != "none":
        shape = (
            batch if "rows" in of else 1,
            heads * group if "heads" in of else 1,
            queries,
            exact + queries,
        )
        seen = (torch.rand(shape, generator=g) < 0.7) | torch.eye(queries, exact + queries).flip(0, 1).bool()
        if kind == "additive":  # finite biases, and what hides
            bias = torch.randn(shape, generator=g)
            seen = bias.masked_fill(~seen, torch.finfo(torch.float32).min)
    where = BlockRows(rows, ranks, max(map(len, counts)))
    return Problem(
        torch.randn(batch, heads * group, queries, D, generator=g), keys, values, held, where, seen
    )


MASKS = [
    "none",
    *(f"{kind}{of}" for kind in ("bool", "additive") for of in ("", " rows", " heads", " rows heads")),
]


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """Rows of different numbers of blocks, heads of different numbers of kept tokens; both may have none."""
    heads, group, queries, exact = draw(
        st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.integers(0, 4))
    )
    block = st.lists(st.integers(0, 4), min_size=heads, max_size=heads)
    counts = draw(st.lists(st.lists(block, max_size=3), min_size=1, max_size=3))
    return problem(counts, group, queries, exact, draw(st.integers(0, 999)), draw(st.sampled_from(MASKS)))
