"""Causal attention of few heads, with its work spread evenly over the threads of a CPU.

Torch gives each thread as many rows in a run as any other, head after head. Later rows of a causal head see
more keys, so where heads are no multiple of the threads one thread is late: with one head and two threads by
half. Cut into parts, as many heads lie on the diagonal as suit the threads, and what lies below it is the
same work for every row.
"""

from __future__ import annotations

import math
from fractions import Fraction
from functools import cache

import torch
from torch import Tensor, cat
from torch.nn.functional import scaled_dot_product_attention

from capsight.partial_attention import added_up, has_kernel, partial_attention

LATE = Fraction(11, 10)
"""The last thread may have this many times its share."""

PARTS = 4
"""Parts at most: each is a call of its own."""

LONG = 4096
"""Rows of a head that are worth the calls."""


def causal(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """Plain causal attention; no mask is made.

    Args:
        query: `[N, G, S, D]`: G heads share each KV head.
        key: `[N, S, D]`.
        value: `[N, S, D]`.
        scaling: factor on the scores.

    Returns:
        `[N, G, S, D]`.
    """
    kv_heads, group, count, _ = query.shape
    parts = parts_of(kv_heads * group, torch.get_num_threads())
    k, v = (x[:, None].expand(-1, group, -1, -1) for x in (key, value))  # [N, G, S, D]
    if parts == 1 or count < LONG or not has_kernel(query, key, value):
        return scaled_dot_product_attention(query, k, v, is_causal=True, scale=scaling)
    size = count // parts
    q, k, v = (x[:, :, : parts * size].unflatten(2, (parts, size)) for x in (query, k, v))  # [N, G, P, n, D]
    q_own, k_own, v_own = (x.flatten(0, 1) for x in (q, k, v))
    diagonal = partial_attention(q_own, k_own, v_own, None, scaling, causal=True)
    out, lse = (x.unflatten(0, (kv_heads, group)) for x in diagonal)  # [N, G, P, n, D] and [N, G, P, n]
    done = [out[:, :, 0]]
    for part in range(1, parts):
        k, v = (x[None, :, : part * size] for x in (key, value))  # [1, N, m, D]
        folded = q[:, :, part].flatten(1, 2)[None]  # [1, N, G n, D]
        other, of_other = partial_attention(folded, k, v, None, scaling)
        seen = other[0].unflatten(1, (group, size)), of_other[0].unflatten(1, (group, size))
        done.append(added_up((out[:, :, part], lse[:, :, part]), seen).to(query.dtype))
    if parts * size < count:
        rows = torch.arange(parts * size, count)
        mask = torch.arange(count) <= rows[:, None]  # [S % P, S]
        k, v = (x[:, None].expand(-1, group, -1, -1) for x in (key, value))
        done.append(scaled_dot_product_attention(query[:, :, rows], k, v, attn_mask=mask, scale=scaling))
    return cat(done, 2)


@cache
def parts_of(heads: int, threads: int) -> int:
    """How many parts each head is to be cut into; 1 where the last thread is hardly late.

    Args:
        heads: that are causal, over as many rows each.
        threads: that share their rows.
    """

    def work(thread: int) -> Fraction:  # of all threads before this one, in heads
        whole, rest = divmod(thread * heads, threads)
        return whole + Fraction(rest, threads) ** 2

    last = max(work(thread + 1) - work(thread) for thread in range(threads))
    return min(threads // math.gcd(heads, threads), PARTS) if last > LATE * Fraction(heads, threads) else 1
