"""SDPA per segment of a prompt, over gathered keys: no compilation, no S x S tensor."""

from __future__ import annotations

from torch import Tensor, cat
from torch.nn.functional import pad, scaled_dot_product_attention

from capsight.blindsight.attention import balanced
from capsight.blindsight.attention.segment_plan import Segment, segment_plan
from capsight.blindsight.attention.work import Work
from capsight.partial_attention import added_up, has_kernel, partial_attention


def attend(query: Tensor, key: Tensor, value: Tensor, work: Work, scaling: float) -> Tensor:
    """See `Attend`. One or two calls of fused attention per segment of the plan."""
    plan = segment_plan(work, query.device)
    sides = [(x, x.index_select(1, plan.front)) for x in (key, value)]
    if len(plan.segments) == 1 and plan.segments[0].rows == slice(0, query.shape[2]):
        return _over(plan.segments[0], query, sides, work.chunk.first_key, scaling)
    out = query.new_zeros(query.shape)
    for segment in plan.segments:
        rows = segment.rows
        out[:, :, rows] = _over(segment, query[:, :, rows], sides, work.chunk.first_key, scaling)
    return out


def _over(
    segment: Segment, query: Tensor, sides: list[tuple[Tensor, Tensor]], first_key: int, scaling: float
) -> Tensor:
    """Attention of the queries of a segment: `[N, G, n, D]`.

    Args:
        segment: what they see.
        query: `[N, G, n, D]`.
        sides: all keys `[N, T, D]` and those of the front `[N, F, D]`; values likewise.
        first_key: position of the first of all keys.
        scaling: factor on the scores.
    """
    seen, own = (slice(start - first_key, end - first_key) for start, end in (segment.seen, segment.own))
    k, v = (_joined(front[:, : segment.context], x[:, own]) for x, front in sides)  # 2 x [N, m, D]
    if seen.start == seen.stop:
        return _one_call(query, k, v, segment.mask, segment.causal, scaling)
    before_k, before_v = (x[:, seen] for x, _ in sides)  # 2 x [N, m', D]
    if not has_kernel(query, k, v):
        mask = None if segment.mask is None else pad(segment.mask, (before_k.shape[1], 0), value=True)
        return _one_call(query, _joined(before_k, k), _joined(before_v, v), mask, False, scaling)
    shape = query.shape[1:3]
    folded = query.flatten(1, 2)[None]  # [1, N, G n, D]: without a mask, heads that share keys are like rows
    out, lse = partial_attention(folded, before_k[None], before_v[None], None, scaling)
    before = out[0].unflatten(1, shape), lse[0].unflatten(1, shape)
    k, v = (_shared(x, query.shape[1]) for x in (k, v))
    return added_up(before, partial_attention(query, k, v, segment.mask, scaling)).to(query.dtype)


def _one_call(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scaling: float
) -> Tensor:
    """Attention of `[N, G, n, D]` over `[N, m, D]`; if `causal`, the last n keys are the queries' own.

    Then as many empty queries as there are other keys are put in front, which makes it plainly causal: the
    fused kernels know no other causal alignment, and skip what lies above the diagonal.
    """
    n, other = query.shape[2], key.shape[1] - query.shape[2]
    if causal and not other:
        return balanced.causal(query, key, value, scaling)
    if causal:
        query = cat((query.new_zeros(*query.shape[:2], other, query.shape[3]), query), 2)  # [N, G, m, D]
    k, v = (_shared(x, query.shape[1]) for x in (key, value))
    out = scaled_dot_product_attention(query, k, v, attn_mask=mask, is_causal=causal, scale=scaling)
    return out[:, :, -n:]


def _shared(x: Tensor, heads: int) -> Tensor:
    """`[N, m, D]` shared by `heads` query heads each: `[N, G, m, D]`, no copy."""
    return x[:, None].expand(-1, heads, -1, -1)


def _joined(first: Tensor, second: Tensor) -> Tensor:
    """Both along the tokens of `[N, S, D]`, without a copy where the first are none."""
    return cat((first, second), 1) if first.shape[1] else second
