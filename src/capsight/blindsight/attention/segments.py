"""SDPA per segment of a prompt, over gathered keys: no compilation, no S x S tensor."""

from __future__ import annotations

from torch import Tensor, cat
from torch.nn.functional import scaled_dot_product_attention

from capsight.blindsight.attention.segment_plan import segment_plan
from capsight.blindsight.attention.work import Work


def attend(query: Tensor, key: Tensor, value: Tensor, work: Work, scaling: float) -> Tensor:
    """See `Attend`.

    One SDPA call per segment of the plan. Where a segment is causal towards its last keys, as many
    empty queries as there are keys before it are put in front, which makes it plainly causal: the
    fused kernels know no other causal alignment, and skip what lies above the diagonal.
    """
    plan = segment_plan(work, query.device)
    first_key = work.chunk.first_key
    out = query.new_zeros(query.shape)
    front = [x.index_select(1, plan.front) for x in (key, value)]  # 2 x [H, F, D]
    for segment in plan.segments:
        a, b = (position - first_key for position in segment.own)
        k, v = (
            cat((f[:, : segment.context], x[:, a:b]), 1) if segment.context else x[:, a:b]
            for f, x in zip(front, (key, value), strict=True)
        )  # 2 x [H, m, D]
        q = query[:, segment.rows]  # [H, n, D]
        n = q.shape[1]
        if segment.causal and k.shape[1] > n:
            q = cat((q.new_zeros(q.shape[0], k.shape[1] - n, q.shape[2]), q), 1)  # [H, m, D]
        found = scaled_dot_product_attention(
            q[None], k[None], v[None], attn_mask=segment.mask, is_causal=segment.causal, scale=scaling
        )
        out[:, segment.rows] = found[0, :, -n:]
    return out
