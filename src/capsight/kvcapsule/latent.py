"""Attention over capsules without rebuilding the tokens that they stand for (our design).

The tokens of a block are linear in its r slots, so the scores of a query over them are linear in its
scores over the slots, and what it gathers from them is linear in r sums of probabilities: nothing of
size N x D is made. Plain tensors in, plain tensors out, so that another runtime can share it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_QUERIES = 128  # query tokens at a time: bounds the memory of their scores


@dataclass(frozen=True, slots=True, eq=False)
class TokenMap:
    """How the N tokens of a block follow from its r slots; keys and values have one each.

    The tokens are the slots themselves, if `copied`, then `weights @ slots + rest * mean`. Their order
    is free, since attention does not depend on it, but is the same for keys and values.

    Attributes:
        copied: whether the slots are tokens.
        weights: float32 `[M or 1, T, r]`, of the T tokens that are rebuilt; None if there are none.
        rest: float32 `[M or 1, T]`, weights of `mean`; None if there is no mean.
        mean: float32 `[H, D]`.
    """

    copied: bool = True
    weights: Tensor | None = None
    rest: Tensor | None = None
    mean: Tensor | None = None

    def scores(self, slots: Tensor, mean: Tensor | None) -> list[Tensor]:
        """Scores over tokens, in parts to be put side by side.

        Args:
            slots: `[M, C, r]`, scores of C queries (all heads) over the slots.
            mean: `[M or 1, C]`, scores over `mean`.

        Returns:
            `[M, C, r]`, `[M, C, T]` or both.
        """
        if self.weights is None:
            return [slots]
        rebuilt = slots @ self.weights.mT  # [M, C, T]
        if mean is not None and self.rest is not None:
            rebuilt.addcmul_(mean[:, :, None], self.rest[:, None])
        return [slots, rebuilt] if self.copied else [rebuilt]

    def gather(self, parts: list[Tensor]) -> tuple[Tensor, Tensor | None]:
        """From probabilities of tokens, in parts, those of slots `[M, C, r]` and of `mean` `[M, C]`."""
        if self.weights is None:
            return parts[0], None
        if self.copied:
            copied, rebuilt = parts
            slots = torch.baddbmm(copied, rebuilt, self.weights.expand(len(copied), -1, -1))
        else:
            rebuilt = torch.cat(parts, -1)
            slots = rebuilt @ self.weights
        return slots, None if self.rest is None else (rebuilt @ self.rest[..., None])[..., 0]


@dataclass(frozen=True, slots=True, eq=False)
class LatentBlocks:
    """Capsules of M blocks as attention reads them.

    Attributes:
        keys: `[M, r, H, D]`, slots.
        values: `[M, r, H, D]`, slots.
        key_map: from key slots to keys.
        value_map: from value slots to values; copies them as `key_map` does, or does not copy.
    """

    keys: Tensor
    values: Tensor
    key_map: TokenMap
    value_map: TokenMap


@dataclass(frozen=True, slots=True, eq=False)
class BlockRows:
    """Which rows of the batch the M blocks belong to.

    Attributes:
        rows: int64 `[M]`, row of each block.
        ranks: int64 `[M]`, its number among the blocks of its row.
        most: the largest number of blocks of a row.
    """

    rows: Tensor
    ranks: Tensor
    most: int


def latent_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    blocks: LatentBlocks,
    rows: BlockRows,
    mask: Tensor | None,
    scaling: float,
) -> Tensor:
    """Softmax attention over exact tokens and over all tokens that capsules stand for.

    Every query sees all blocks of its row. Scores and sums are float32 whatever the inputs are.

    Args:
        query: `[B, Hq, Q, D]`; Hq is a multiple of H.
        keys: `[B, H, X, D]`, exact tokens (finite where masked).
        values: `[B, H, X, D]`.
        blocks: capsules of M blocks.
        rows: where they belong.
        mask: over exact tokens, bool or additive `[B or 1, 1 or Hq, Q, X]`; None if all are seen.
        scaling: factor of the scores.

    Returns:
        `[B, Q, Hq, D]` in the dtype of `query`.
    """
    parts = [
        _attend(
            query[:, :, start : start + _QUERIES],
            keys,
            values,
            blocks,
            rows,
            None if mask is None else mask[:, :, start : start + _QUERIES],
            scaling,
        )
        for start in range(0, query.shape[2], _QUERIES)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    blocks: LatentBlocks,
    rows: BlockRows,
    mask: Tensor | None,
    scaling: float,
) -> Tensor:
    batch, query_heads, new, head_dim = query.shape
    heads, work = keys.shape[1], torch.promote_types(query.dtype, torch.float32)
    q = (query.to(work) * scaling).reshape(batch, heads, -1, head_dim)  # [B, H, C / H, D]
    exact = q @ keys.to(work).mT  # [B, H, C / H, X]
    if mask is not None:
        exact = _masked(exact.view(batch, query_heads, new, -1), mask)
    exact = exact.reshape(batch, -1, keys.shape[2])  # [B, C, X], C = Hq * Q
    mean = None
    if blocks.key_map.mean is not None:
        mean = (q @ blocks.key_map.mean.to(work)[:, :, None]).view(batch, -1)  # [B, C]
        mean = mean if batch == 1 else mean[rows.rows]
    parts = blocks.key_map.scores(_slot_scores(q, blocks.keys.to(work), rows), mean)  # [M, C, r], [M, C, T]
    parts = [exact, *(_by_row(part, rows, batch) for part in parts)]
    exact, *parts = torch.cat(parts, -1).softmax(-1).split([part.shape[-1] for part in parts], -1)
    out = exact.view(batch, heads, -1, exact.shape[-1]) @ values.to(work)  # [B, H, C / H, D]
    slots, total = blocks.value_map.gather([_by_block(part, rows) for part in parts])  # [M, C, r], [M, C]
    out += _slot_sums(slots, blocks.values.to(work), rows, batch)
    if total is not None and blocks.value_map.mean is not None:
        total = _row_sums(total, rows, batch)
        out.addcmul_(total.view(*out.shape[:3], 1), blocks.value_map.mean.to(work)[:, None])
    return out.view(batch, query_heads, new, head_dim).transpose(1, 2).to(query.dtype).contiguous()


def _masked(scores: Tensor, mask: Tensor) -> Tensor:
    """Scores `[B, Hq, Q, X]` under a bool or additive mask."""
    if mask.dtype == torch.bool:
        return scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return (scores + mask).clamp_min(torch.finfo(scores.dtype).min)


def _slot_scores(q: Tensor, slots: Tensor, rows: BlockRows) -> Tensor:
    """Scores `[M, C, r]` of queries `[B, H, C / H, D]` over slots `[M, r, H, D]`."""
    if q.shape[0] == 1:  # one product per head over all blocks; the slots are not copied
        scores = q[0] @ slots.flatten(0, 1).permute(1, 2, 0)  # [H, C / H, M * r]
        return scores.view(-1, *slots.shape[:2]).transpose(0, 1)
    return (q[rows.rows] @ slots.permute(0, 2, 3, 1)).flatten(1, 2)


def _slot_sums(p: Tensor, slots: Tensor, rows: BlockRows, batch: int) -> Tensor:
    """Sums of slots `[M, r, H, D]` with weights `[M, C, r]`, over the blocks of a row: `[B, H, C / H, D]`."""
    blocks, count, heads, _ = slots.shape
    if batch == 1:
        p = p.transpose(0, 1).reshape(heads, -1, blocks * count)
        return (p @ slots.flatten(0, 1).transpose(0, 1))[None]
    each = p.view(blocks, heads, -1, count) @ slots.transpose(1, 2)  # [M, H, C / H, D]
    return _row_sums(each, rows, batch)


def _row_sums(x: Tensor, rows: BlockRows, batch: int) -> Tensor:
    """Sums over the blocks of a row: `[M, ...]` -> `[B, ...]`."""
    if batch == 1:
        return x.sum(0, keepdim=True)
    return x.new_zeros(batch, *x.shape[1:]).index_add_(0, rows.rows, x)


def _by_row(x: Tensor, rows: BlockRows, batch: int) -> Tensor:
    """Scores `[M, C, N]` of blocks side by side in their rows: `[B, C, most * N]`, minimal where none is."""
    _, queries, size = x.shape
    if batch == 1:
        return x.transpose(0, 1).reshape(1, queries, -1)
    full = x.new_full((batch, rows.most, queries, size), torch.finfo(x.dtype).min)
    full[rows.rows, rows.ranks] = x
    return full.transpose(1, 2).flatten(2)


def _by_block(x: Tensor, rows: BlockRows) -> Tensor:
    """The blocks' parts `[M, C, N]` of `[B, C, most * N]`."""
    parts = x.unflatten(2, (rows.most, -1)).transpose(1, 2)  # [B, most, C, N]
    return parts[0] if x.shape[0] == 1 else parts[rows.rows, rows.ranks]
