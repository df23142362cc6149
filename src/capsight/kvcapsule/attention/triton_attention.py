"""Attention over capsules on a GPU: launches the kernels and merges what they leave. Needs triton."""

from __future__ import annotations

import subprocess

import torch
import triton
from torch import Tensor
from triton.errors import TritonError

from capsight.kvcapsule.attention.blocks import BlockRows, LatentBlocks, TokenMap
from capsight.kvcapsule.attention.choice import LatentKernelError
from capsight.kvcapsule.attention.kernels import over_capsules, over_exact

_TOKENS = 64  # exact tokens in a tile
_STEPS = 4  # tiles of them in a share
_TILE = 64  # the most queries in a tile
_PROGRAMS = 4  # programs for each multiprocessor that shares of the capsules should give


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    blocks: LatentBlocks,
    rows: BlockRows,
    mask: Tensor | None,
    scaling: float,
) -> Tensor:
    """See `latent_attention`. No gradients.

    Raises:
        LatentKernelError: Triton cannot compile the kernels here.
    """
    batch, query_heads, new, head_dim = query.shape
    heads, tokens = keys.shape[1:3]
    count = query_heads // heads * new  # queries of a KV head
    tile = min(_TILE, _padded(count))
    tiles, pairs = triton.cdiv(count, tile), batch * heads
    shares = max(1, min(rows.most, triton.cdiv(_PROGRAMS * _processors(query), tiles * pairs)))
    exact_shares = triton.cdiv(tokens, _TOKENS * _STEPS)
    out = query.new_empty(shares + exact_shares, pairs, count, head_dim, dtype=torch.float32)
    lse = query.new_empty(shares + exact_shares, pairs, count, dtype=torch.float32)
    first = torch.searchsorted(rows.rows, torch.arange(batch + 1, device=query.device))  # [B + 1]
    sizes = {"heads": heads, "group": query_heads // heads, "new": new, "head_dim": head_dim}
    options = {
        "PRECISION": _precision(query.dtype),
        "BC": tile,
        "BD": _padded(head_dim),
        "num_stages": 2 if query.dtype.itemsize == 2 else 1,  # operands of the next block in flight
    }
    key_map, value_map = blocks.key_map, blocks.value_map
    slots, rebuilt = blocks.keys.shape[1], 0 if key_map.weights is None else key_map.weights.shape[1]
    try:
        with torch.cuda.device_of(query):
            over_capsules[tiles, pairs, shares](
                query,
                blocks.keys,
                blocks.values,
                *_pointers(key_map),
                *_pointers(value_map),
                first,
                out,
                lse,
                query.stride(),
                blocks.keys.stride(),
                blocks.values.stride(),
                *_strides(key_map),
                *_strides(value_map),
                scaling,
                slots=slots,
                rebuilt=rebuilt,
                SLOT_TOKENS=key_map.slot_tokens,
                COPIED=value_map.slot_tokens,
                BR=_padded(slots),
                BT=_padded(rebuilt),
                **sizes,
                **options,
            )
            if tokens:
                full = None if mask is None else mask.expand(batch, query_heads, new, tokens)
                additive = full is not None and full.dtype != torch.bool
                over_exact[tiles, pairs, exact_shares](
                    query,
                    keys,
                    values,
                    full if full is None or additive else full.view(torch.int8),
                    out,
                    lse,
                    query.stride(),
                    keys.stride(),
                    values.stride(),
                    (0, 0, 0, 0) if full is None else full.stride(),
                    scaling,
                    tokens=tokens,
                    shares=shares,
                    ADDITIVE=additive,
                    BX=_TOKENS,
                    STEPS=_STEPS,
                    **sizes,
                    **options,
                )
    except (TritonError, subprocess.CalledProcessError) as error:
        raise LatentKernelError(f"Triton cannot compile it here ({error})") from error
    merged = (out * lse.softmax(0)[..., None]).sum(0)  # [B * H, C / H, D]
    merged = merged.view(batch, query_heads, new, head_dim).transpose(1, 2)
    return merged.to(query.dtype).contiguous()


def _pointers(tokens: TokenMap) -> tuple[Tensor | None, ...]:
    """Weights, rest and mean; the latter two only where there are weights."""
    if tokens.weights is None or tokens.rest is None or tokens.mean is None:
        return tokens.weights, None, None
    return tokens.weights, tokens.rest, tokens.mean.contiguous()


def _strides(tokens: TokenMap) -> tuple[tuple[int, ...], ...]:
    """Of weights and rest; 0 along the blocks where these share them."""
    return tuple(
        (0, 0, 0) if x is None else (0 if len(x) == 1 else x.stride(0), *x.stride()[1:])
        for x in (tokens.weights, tokens.rest)
    )


def _padded(size: int) -> int:
    """The size of a tile for `size` entries: a power of two, at least 16."""
    return max(16, triton.next_power_of_2(size))


def _precision(dtype: torch.dtype) -> str:
    """How float32 operands are multiplied: as exact as float32 where that is what came in."""
    if torch.version.hip is not None:
        return "ieee"
    return "tf32x3" if dtype == torch.float32 else "tf32"


def _processors(x: Tensor) -> int:
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1
