"""Attention over capsules in plain torch: the reference, and what runs on CPUs.

The tokens of a block are linear in its r slots, so the scores of a query over them are linear in its
scores over the slots, and what it gathers from them is linear in r sums of probabilities: nothing of
size N x D is made. One row of the batch at a time, so that its scores stay in cache.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from capsight.kvcapsule.attention.blocks import BlockRows, LatentBlocks, TokenMap

_QUERIES = 128  # query tokens at a time: bounds the memory of their scores
_CACHED = 2**18  # numbers at a time that a CPU converts to the dtype of the sums: 1 MB of float32


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    blocks: LatentBlocks,
    rows: BlockRows,
    mask: Tensor | None,
    scaling: float,
) -> Tensor:
    """See `latent_attention`."""
    batch, query_heads, count, head_dim = query.shape
    out = query.new_empty(batch, count, query_heads, head_dim)
    if mask is not None:
        mask = mask.expand(batch, -1, -1, -1)
    work = torch.promote_types(query.dtype, torch.float32)
    for row in range(batch):
        row_blocks = blocks.part(*rows.spans[row]) if row in rows.spans else None
        for start in range(0, count, _QUERIES):
            new = slice(start, start + _QUERIES)
            q = (query[row, :, new].to(work) * scaling).reshape(keys.shape[1], -1, head_dim)
            seen = None if mask is None else mask[row, :, new]
            row_out = _attend_row(q, keys[row], values[row], row_blocks, seen)  # [H, C / H, D], C = Hq * Q
            out[row, new] = row_out.view(query_heads, -1, head_dim).transpose(0, 1)
    return out


def _attend_row(
    q: Tensor, keys: Tensor, values: Tensor, blocks: LatentBlocks | None, mask: Tensor | None
) -> Tensor:
    """Attention of one row.

    Args:
        q: `[H, C / H, D]`, scaled queries, in the dtype of the sums.
        keys: `[H, X, D]`, exact tokens.
        values: `[H, X, D]`.
        blocks: capsules; None if there are none.
        mask: over exact tokens, bool or additive `[1 or Hq, Q, X]`.

    Returns:
        `[H, C / H, D]`.
    """
    exact = q @ keys.to(q.dtype).mT  # [H, C / H, X]
    if mask is not None:
        exact = _masked(exact.view(-1, *mask.shape[1:]), mask)
    exact = exact.view(len(q) * q.shape[1], -1)  # [C, X]
    parts = [] if blocks is None else _scores(q, blocks)  # [C, M, r], [C, M, T]
    p_exact, *p_blocks = _softmax([exact[:, None], *parts])
    out = p_exact.view(*q.shape[:2], -1) @ values.to(q.dtype)  # [H, C / H, D]
    if blocks is not None:
        _add_values(out, p_blocks, blocks)
    return out


def _masked(scores: Tensor, mask: Tensor) -> Tensor:
    """Scores `[Hq, Q, X]` under a bool or additive mask."""
    if mask.dtype == torch.bool:
        return scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return (scores + mask).clamp_min(torch.finfo(scores.dtype).min)


def _softmax(parts: list[Tensor]) -> list[Tensor]:
    """Softmax of scores `[C, M, n]` over all but the first axis of all parts."""
    widths = [part[0].numel() for part in parts]
    scores = parts[0].new_empty(len(parts[0]), sum(widths))
    start = 0
    for width, part in zip(widths, parts, strict=True):
        scores[:, start : start + width].view(part.shape).copy_(part)
        start += width
    probabilities = scores.softmax(-1).split(widths, 1)
    return [columns.view(part.shape) for columns, part in zip(probabilities, parts, strict=True)]


def _scores(q: Tensor, blocks: LatentBlocks) -> list[Tensor]:
    """Scores over tokens: `[C, M, r]`, `[C, M, T]`, or both."""
    count, size = blocks.keys.shape[:2]
    over = [q @ slots.permute(1, 2, 0) for slots in _chunks(blocks.keys, q)]  # [H, C / H, n * r]
    slots = (over[0] if len(over) == 1 else torch.cat(over, 2)).view(-1, count, size)  # [C, M, r]
    tokens = blocks.key_map
    if tokens.weights is None:
        return [slots]
    rebuilt = slots.transpose(0, 1) @ tokens.weights.to(q.dtype).mT  # [M, C, T]
    if tokens.rest is not None and tokens.mean is not None:
        mean = (q @ tokens.mean.to(q.dtype)[..., None]).view(-1, 1)  # [C, 1]
        rebuilt.addcmul_(mean, tokens.rest.to(q.dtype)[:, None])
    rebuilt = rebuilt.transpose(0, 1)
    return [slots, rebuilt] if tokens.copied else [rebuilt]


def _add_values(out: Tensor, parts: list[Tensor], blocks: LatentBlocks) -> None:
    """Add to `out` `[H, C / H, D]` what tokens with probabilities `parts`, as of `_scores`, give."""
    slots = _gather(parts, blocks.value_map)  # [C, M, r]
    slots = slots.reshape(*out.shape[:2], -1)  # [H, C / H, M * r]
    start = 0
    for chunk in _chunks(blocks.values, out):  # [n * r, H, D]
        out.baddbmm_(slots[:, :, start : start + len(chunk)], chunk.transpose(0, 1))
        start += len(chunk)
    rest, mean = blocks.value_map.rest, blocks.value_map.mean
    if rest is not None and mean is not None:
        for part, weights in _rebuilt(parts, rest.to(out.dtype), blocks.value_map):
            total = part.flatten(1) @ weights.expand(part.shape[1], -1).flatten()  # [C]
            out.addcmul_(total.view(*out.shape[:2], 1), mean.to(out.dtype)[:, None])


def _gather(parts: list[Tensor], tokens: TokenMap) -> Tensor:
    """From probabilities of tokens those of slots: `[C, M, r]`."""
    if tokens.weights is None:
        return parts[0]
    made = [
        part.transpose(0, 1) @ weights
        for part, weights in _rebuilt(parts, tokens.weights.to(parts[0]), tokens)
    ]  # [M, C, r]
    if tokens.copied:
        return parts[0] + made[0].transpose(0, 1)
    return sum(made[1:], made[0]).transpose(0, 1)


def _rebuilt(parts: list[Tensor], weights: Tensor, tokens: TokenMap) -> Iterator[tuple[Tensor, Tensor]]:
    """The parts `[C, M, n]` that are of rebuilt tokens, each with its share of weights `[M or 1, T, ...]`."""
    rebuilt = parts[1:] if tokens.copied else parts
    yield from zip(rebuilt, weights.split([part.shape[2] for part in rebuilt], 1), strict=True)


def _chunks(slots: Tensor, like: Tensor) -> Iterator[Tensor]:
    """Slots `[M, r, H, D]` as `[n * r, H, D]` in the dtype of `like`; on a CPU a few blocks at a time.

    Numbers of 16 bits are read from memory once and what they become stays in cache. A chunk is valid
    until the next one, unless `like` needs gradients.
    """
    if slots.dtype == like.dtype or slots.device.type != "cpu" or like.requires_grad:
        yield slots.to(like.dtype).flatten(0, 1)
        return
    step = max(1, _CACHED // slots[0].numel())
    wide = like.new_empty(min(step, len(slots)), *slots.shape[1:])
    for part in slots.split(step):
        yield wide[: len(part)].copy_(part).flatten(0, 1)
