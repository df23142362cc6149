"""Reads tokens out of vLLM's paged memory."""

from __future__ import annotations

import torch
from torch import Tensor

from capsight.errors import UnsupportedModelError

READABLE = ("vec", "vec16")
"""vLLM's names of CPU kernels whose blocks `read_tokens` knows."""


def check_readable(kernel: str) -> None:
    """Refuse kernels whose blocks lie otherwise.

    Args:
        kernel: what vLLM calls the instruction set of its attention kernel (`layer.isa`).

    Raises:
        UnsupportedModelError: the kernel packs keys in another way.
    """
    if kernel not in READABLE:
        raise UnsupportedModelError(
            f"capsight does not read the paged memory of vLLM's {kernel!r} CPU kernels; "
            "start with --dtype float32"
        )


def read_tokens(kv_cache: Tensor, blocks: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Keys and values of the first tokens of one request, copied out of a CPU's paged memory.

    In each block and head of it, keys lie `[D, block size]`, values behind them `[block size, D]`.

    Args:
        kv_cache: of one layer, `[blocks, Hkv, block size, 2 D]`.
        blocks: int `[n]`, which blocks hold the request's tokens, in order.
        count: tokens to read (T), at most n x block size.

    Returns:
        Keys (after RoPE) and values, both `[Hkv, T, D]`.
    """
    size, double = kv_cache.shape[2:]
    read = blocks[: -(-count // size)].to(torch.int64)
    held = kv_cache.index_select(0, read).flatten(2)  # [n, Hkv, 2 D size]
    key, value = held.chunk(2, dim=2)
    key = key.unflatten(2, (double // 2, size)).permute(1, 0, 3, 2)  # [Hkv, n, size, D]
    value = value.unflatten(2, (size, double // 2)).transpose(0, 1)  # [Hkv, n, size, D]
    return key.flatten(1, 2)[:, :count], value.flatten(1, 2)[:, :count]


def read_blocks(kv_cache: Tensor, blocks: Tensor) -> Tensor:
    """Keys and values of all tokens of some blocks, copied out of a CPU's paged memory.

    Args:
        kv_cache: see `read_tokens`.
        blocks: int64 `[n]`.

    Returns:
        `[2, n x block size, Hkv, D]`, block by block.
    """
    size, double = kv_cache.shape[2:]
    held = kv_cache.index_select(0, blocks).flatten(2)  # [n, Hkv, 2 D size]
    key, value = held.chunk(2, dim=2)
    out = kv_cache.new_empty(2, len(blocks), size, kv_cache.shape[1], double // 2)
    out[0] = key.unflatten(2, (double // 2, size)).permute(0, 3, 1, 2)
    out[1] = value.unflatten(2, (size, double // 2)).transpose(1, 2)
    return out.flatten(1, 2)
