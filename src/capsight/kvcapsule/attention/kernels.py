"""The Triton kernels of attention over capsules: one over capsules, one over exact tokens.

Both leave, for a share of the tokens, a softmax over that share and the log of its normaliser. Scores of
rebuilt tokens and what they gather stay on chip, as does everything else of a block's size.
Running maximum and sum are those of online softmax (Milakov and Gimelshein, arXiv 1805.02867), shares of
the tokens for several programs those of Flash-Decoding.
"""

from __future__ import annotations

import triton
import triton.language as tl

_LOWEST = tl.constexpr(-3.4028234663852886e38)
_NEVER = tl.constexpr(float("-inf"))


@triton.jit
def _tile(base, i, step_i, is_i, j, step_j, is_j):
    """Entries `[i, j]` of a matrix; 0 where there are none."""
    at = base + i[:, None] * step_i + j[None, :] * step_j
    return tl.load(at, mask=is_i[:, None] & is_j[None, :], other=0)


@triton.jit
def _query(query, strides, batch, head, c, is_c, d, is_d, group, new):
    """Queries `[BC, BD]` of KV head `head`: row c is query c % new of query head c // new of its group."""
    at = batch * strides[0] + (head * group + c // new) * strides[1] + (c % new) * strides[2]
    seen = is_c[:, None] & is_d[None, :]
    return tl.load(query + at[:, None] + d[None, :] * strides[3], mask=seen, other=0)


@triton.jit
def _store(out, lse, acc, top, total, part, c, is_c, count, d, is_d, head_dim):
    """Leave `acc / total` in `out` `[P, B, H, C / H, D]` and the log of the normaliser in `lse`."""
    at = (part * tl.num_programs(1) + tl.program_id(1)).to(tl.int64) * count + c
    divisor = tl.where(total > 0, total, 1.0)
    acc = acc / divisor[:, None]
    tl.store(out + at[:, None] * head_dim + d[None, :], acc, mask=is_c[:, None] & is_d[None, :])
    tl.store(lse + at, tl.where(total > 0, top + tl.log(divisor), _NEVER), mask=is_c)


@triton.jit
def over_capsules(
    query,  # [B, Hq, Q, D]
    key_slots,  # [M, r, H, D]
    value_slots,
    key_weights,  # [M or 1, T, r], or None
    key_rest,  # [M or 1, T], or None
    key_mean,  # [H, D], or None
    value_weights,  # [M or 1, T or r + T, r], or None
    value_rest,
    value_mean,
    first,  # int64 [B + 1], first block of each row
    out,  # float32 [P, B, H, C / H, D]
    lse,  # float32 [P, B, H, C / H]
    query_strides,
    key_strides,
    value_strides,
    key_weight_strides,
    key_rest_strides,
    value_weight_strides,
    value_rest_strides,
    scaling,
    heads,
    group,
    new,
    slots,
    rebuilt,
    head_dim,
    SLOT_TOKENS: tl.constexpr,  # the slots are tokens, which come first
    COPIED: tl.constexpr,  # the values of those are the value slots
    PRECISION: tl.constexpr,
    BC: tl.constexpr,
    BR: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
):
    """Capsules of one share of one row's blocks; grid: tiles of queries, B * H, shares."""
    batch, head = tl.program_id(1) // heads, tl.program_id(1) % heads
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    d, r, t = tl.arange(0, BD), tl.arange(0, BR), tl.arange(0, BT)
    is_c, is_d, is_r, is_t = c < group * new, d < head_dim, r < slots, t < rebuilt
    q = _query(query, query_strides, batch, head, c, is_c, d, is_d, group, new)
    if key_mean is not None:
        mean = tl.load(key_mean + head * head_dim + d, mask=is_d, other=0).to(tl.float32)
        mean_scores = tl.sum(q.to(tl.float32) * mean[None, :], 1) * scaling  # [BC]
    begin, end = tl.load(first + batch), tl.load(first + batch + 1)
    each = tl.cdiv(end - begin, tl.num_programs(2))
    start = begin + tl.program_id(2) * each
    top = tl.full([BC], _LOWEST, tl.float32)
    total = tl.zeros([BC], tl.float32)
    mean_total = tl.zeros([BC], tl.float32)
    acc = tl.zeros([BC, BD], tl.float32)
    for block in range(start, tl.minimum(start + each, end)):
        at = key_slots + block * key_strides[0] + head * key_strides[2]
        k = _tile(at, d, key_strides[3], is_d, r, key_strides[1], is_r)  # [BD, BR]
        slot_scores = tl.dot(q, k, input_precision=PRECISION) * scaling  # [BC, BR]
        now = top
        if SLOT_TOKENS:
            kept_scores = tl.where(is_r[None, :], slot_scores, _NEVER)
            now = tl.maximum(now, tl.max(kept_scores, 1))
        if key_weights is not None:
            s = key_weight_strides
            w = _tile(key_weights + block * s[0], r, s[2], is_r, t, s[1], is_t)  # [BR, BT]
            others = tl.dot(slot_scores, w.to(tl.float32), input_precision=PRECISION)  # [BC, BT]
            if key_rest is not None:
                at = key_rest + block * key_rest_strides[0] + t * key_rest_strides[1]
                others += mean_scores[:, None] * tl.load(at, mask=is_t, other=0).to(tl.float32)[None, :]
            others = tl.where(is_t[None, :], others, _NEVER)
            now = tl.maximum(now, tl.max(others, 1))
        shrink = tl.exp(top - now)
        top, total, mean_total = now, total * shrink, mean_total * shrink
        gathered = tl.zeros([BC, BR], tl.float32)  # sums of probabilities, one for each value slot
        offset = 0  # of the others among the value map's tokens
        if SLOT_TOKENS:
            p = tl.exp(kept_scores - now[:, None])
            total += tl.sum(p, 1)
            if COPIED:
                gathered += p
            else:
                offset = slots
                s = value_weight_strides
                r2 = tl.arange(0, BR)
                w = _tile(value_weights + block * s[0], r2, s[1], r2 < slots, r, s[2], is_r)  # [BR, BR]
                gathered += tl.dot(p, w.to(tl.float32), input_precision=PRECISION)
                if value_rest is not None:
                    at = value_rest + block * value_rest_strides[0] + r * value_rest_strides[1]
                    mean_total += tl.sum(p * tl.load(at, mask=is_r, other=0).to(tl.float32)[None, :], 1)
        if key_weights is not None:
            p = tl.exp(others - now[:, None])
            total += tl.sum(p, 1)
            s = value_weight_strides
            w = _tile(value_weights + block * s[0], offset + t, s[1], is_t, r, s[2], is_r)  # [BT, BR]
            gathered += tl.dot(p, w.to(tl.float32), input_precision=PRECISION)
            if value_rest is not None:
                at = value_rest + block * value_rest_strides[0] + (offset + t) * value_rest_strides[1]
                mean_total += tl.sum(p * tl.load(at, mask=is_t, other=0).to(tl.float32)[None, :], 1)
        at = value_slots + block * value_strides[0] + head * value_strides[2]
        v = _tile(at, r, value_strides[1], is_r, d, value_strides[3], is_d)  # [BR, BD]
        acc = acc * shrink[:, None] + tl.dot(gathered.to(v.dtype), v, input_precision=PRECISION)
    if value_mean is not None:
        mean = tl.load(value_mean + head * head_dim + d, mask=is_d, other=0).to(tl.float32)
        acc += mean_total[:, None] * mean[None, :]
    _store(out, lse, acc, top, total, tl.program_id(2), c, is_c, group * new, d, is_d, head_dim)


@triton.jit
def over_exact(
    query,  # [B, Hq, Q, D]
    keys,  # [B, H, X, D]
    values,
    mask,  # int8 or float [B, Hq, Q, X], or None
    out,  # as of over_capsules
    lse,
    query_strides,
    key_strides,
    value_strides,
    mask_strides,
    scaling,
    heads,
    group,
    new,
    tokens,
    head_dim,
    shares,  # parts of `out` that capsules take
    ADDITIVE: tl.constexpr,
    PRECISION: tl.constexpr,
    BC: tl.constexpr,
    BX: tl.constexpr,
    BD: tl.constexpr,
    STEPS: tl.constexpr,  # tiles of BX tokens in a share
):
    """Exact tokens of one share of one row; grid: tiles of queries, B * H, shares."""
    batch, head = (tl.program_id(1) // heads).to(tl.int64), tl.program_id(1) % heads
    c, d = tl.program_id(0) * BC + tl.arange(0, BC), tl.arange(0, BD)
    is_c, is_d = c < group * new, d < head_dim
    q = _query(query, query_strides, batch, head, c, is_c, d, is_d, group, new)
    s = mask_strides
    mask_rows = batch * s[0] + (head * group + c // new) * s[1] + c % new * s[2]
    top = tl.full([BC], _LOWEST, tl.float32)
    total = tl.zeros([BC], tl.float32)
    acc = tl.zeros([BC, BD], tl.float32)
    start = tl.program_id(2) * STEPS * BX
    for begin in range(start, tl.minimum(start + STEPS * BX, tokens), BX):
        x = begin + tl.arange(0, BX)
        is_x = x < tokens
        at = keys + batch * key_strides[0] + head * key_strides[1]
        k = _tile(at, d, key_strides[3], is_d, x, key_strides[2], is_x)  # [BD, BX]
        scores = tl.dot(q, k, input_precision=PRECISION) * scaling  # [BC, BX]
        if mask is not None:
            seen = _tile(mask, mask_rows, 1, is_c, x, s[3], is_x)
            if ADDITIVE:
                scores = tl.maximum(scores + seen.to(tl.float32), _LOWEST)
            else:
                scores = tl.where(seen != 0, scores, _LOWEST)
        scores = tl.where(is_x[None, :], scores, _NEVER)
        now = tl.maximum(top, tl.max(scores, 1))
        shrink = tl.exp(top - now)
        p = tl.exp(scores - now[:, None])
        top, total = now, total * shrink + tl.sum(p, 1)
        at = values + batch * value_strides[0] + head * value_strides[1]
        v = _tile(at, x, value_strides[2], is_x, d, value_strides[3], is_d)  # [BX, BD]
        acc = acc * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
    _store(out, lse, acc, top, total, shares + tl.program_id(2), c, is_c, group * new, d, is_d, head_dim)
