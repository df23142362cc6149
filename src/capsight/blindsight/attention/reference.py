"""The oracle: a dense boolean mask, straight from the definition, and plain SDPA."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from capsight.blindsight.attention.work import Work
from capsight.blindsight.masks import base_mask, category_mask


def attend(query: Tensor, key: Tensor, value: Tensor, work: Work, scaling: float) -> Tensor:
    """See `Attend`. Makes an S x S mask, and is slower than dense attention."""
    chunk, skip = work.chunk, work.first_row - work.chunk.first_query
    mask = base_mask(work.row, work.rule) & category_mask(work.row, work.options, work.category)
    mask = mask[work.first_row : chunk.end, chunk.first_key : chunk.end].to(query.device)
    out = query.new_zeros(query.shape)
    if mask.shape[0]:
        k, v = (x[:, None].expand(-1, query.shape[1], -1, -1) for x in (key, value))  # [N, G, T, D]
        rows = scaled_dot_product_attention(query[:, :, skip:], k, v, attn_mask=mask, scale=scaling)
        out[:, :, skip:] = rows
    return out
