"""FlexAttention over the tiles of a `FlexPlan`, compiled once per dtype and head size.

One compiled function serves every layout, category, rule, length and number of heads: heads are the
batch dimension, lengths are dynamic, and the mask is data (four integers a query, one a key).
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
import torch.fx.experimental._config
from torch import Tensor
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException
from torch._inductor.exc import InductorError
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from capsight.blindsight.attention.flex_plan import TILE, flex_plan
from capsight.blindsight.attention.work import Work
from capsight.errors import CapsightError

COMPILE_LIMIT = 64
"""Variants (dtype, head size, scaling, one head or several, threads) before compiling is refused."""

_LOCK = threading.Lock()
"""The compiler's settings are global to the process."""


class FlexUnavailableError(CapsightError):
    """FlexAttention cannot be compiled here; use `implementation="segments"` instead."""


def attend(query: Tensor, key: Tensor, value: Tensor, work: Work, scaling: float) -> Tensor:
    """See `Attend`. No gradients.

    Raises:
        FlexUnavailableError: there is no compiler here, compiling failed, or it was asked for too many
            variants. It never runs uncompiled: that would make the S x S tensor.
    """
    reason = missing(query.device.type, query.dtype)
    if reason:
        raise FlexUnavailableError(f'{reason}; use implementation="segments"')
    plan = flex_plan(work, query.device)
    q = query.flatten(0, 1).index_select(1, plan.rows)[:, None]  # [H, 1, Q, D], H = N G
    k, v = (  # [H, 1, K, D]
        x.index_select(1, plan.keys)[:, None].repeat_interleave(query.shape[1], 0) for x in (key, value)
    )
    tiles = (plan.partial_count, plan.partial, plan.full_count, plan.full)
    try:
        with torch.no_grad(), _LOCK, _config():
            packed = _compiled()(q, k, v, *tiles, plan.bounds, plan.codes, scaling)  # [H, 1, Q, D]
    except FailOnRecompileLimitHit as error:
        raise FlexUnavailableError(
            f"FlexAttention was compiled {COMPILE_LIMIT} times in this process, for that many dtypes, head "
            'sizes and scalings; use implementation="segments", or a new process'
        ) from error
    except (TorchDynamoException, InductorError) as error:
        raise FlexUnavailableError(
            f'FlexAttention does not compile here ({error}); use implementation="segments"'
        ) from error
    out = query.new_zeros(query.shape)
    packed = packed[:, 0].index_select(1, plan.slots)  # [H, S', D]
    return out.index_copy_(2, plan.targets, packed.unflatten(0, query.shape[:2]))


@contextmanager
def _config() -> Iterator[None]:
    """Compiler settings: a limit of our own, and no two dimensions taken for one that happen to be equal."""
    limit = torch._dynamo.config.patch(recompile_limit=COMPILE_LIMIT)
    shapes = torch.fx.experimental._config.patch(use_duck_shape=False)  # type: ignore[attr-defined]
    with limit, shapes:
        yield


@cache
def missing(device: str, dtype: torch.dtype) -> str:
    """Why FlexAttention cannot be compiled for this kind of device; empty where it can.

    Args:
        device: "cpu", "cuda"...
        dtype: of the tensors.
    """
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"FlexAttention knows no {dtype}"
    if device == "cuda":
        return ""
    if device != "cpu":
        return f"FlexAttention is not used on {device}"
    if not torch.cpu._is_avx2_supported():
        return "FlexAttention on a CPU needs AVX2"
    if not any(shutil.which(name) for name in ("g++", "c++", "clang++", "cl")):
        return "FlexAttention on a CPU needs a C++ compiler; install one (g++)"
    return ""


@cache
def _compiled() -> Any:
    """The compiled function; `fullgraph` makes it raise where it would fall back to uncompiled code."""
    return torch.compile(_tiled_attention, dynamic=True, fullgraph=True)


def _tiled_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    partial_count: Tensor,
    partial: Tensor,
    full_count: Tensor,
    full: Tensor,
    bounds: Tensor,
    codes: Tensor,
    scaling: float,
) -> Tensor:
    """`[H, 1, Q, D]` from query `[H, 1, Q, D]`, key and value `[H, 1, K, D]`; the rest as in `FlexPlan`."""
    lo, split, own_start, last = bounds.unbind(0)

    def seen(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        code = codes[k]
        return ((code >= lo[q]) & (code < split[q])) | ((code >= own_start[q]) & (code <= last[q]))

    mask = BlockMask.from_kv_blocks(
        partial_count,
        partial,
        full_count,
        full,
        BLOCK_SIZE=TILE,
        mask_mod=seen,
        seq_lengths=(query.shape[2], key.shape[2]),
        compute_q_blocks=False,
    )
    return flex_attention(query, key, value, block_mask=mask, scale=scaling)
