"""Bytes of keys and values: of a full cache, and of one with capsules as it would be fitted."""

from __future__ import annotations

import torch

from capsight.kvcapsule import CapsulePlan, KVCapsule
from capsight.kvcapsule.calibration.fit import kept_tokens
from capsight.kvcapsule.codecs import HeadsCodec
from capsight.kvcapsule.info import CapsuleInfo, LayerInfo
from capsight.kvcapsule.plan import DEFAULT_BLOCK_SIZE
from capsight.layout import PromptLayout
from capsight.planning.shape import ModelShape

INDEX_BYTES = 16
"""Two int64 positions that the capsule cache keeps per run and per exact token, shared by all layers."""

SCRATCH_GROWTH = 1.25
"""The scratch buffer is made a quarter larger than needed, so that decoding seldom reallocates."""


def full_kv_bytes(shape: ModelShape, tokens: int, itemsize: int) -> int:
    """Bytes of a stock cache that has seen `tokens` tokens of one request.

    Each layer holds `2 * min(tokens, window - 1) * Hkv * D * itemsize`; layers without a window
    hold all tokens.
    """
    return sum(
        layer.kv_bytes(tokens if layer.window is None else min(tokens, layer.window - 1), itemsize)
        for layer in shape.layers
    )


def state_bytes(shape: ModelShape, itemsize: int) -> int:
    """Bytes of the states of one request, in layers that keep a state instead of keys and values."""
    return sum(layer.state_bytes(itemsize) for layer in shape.layers)


def planned_capsule(
    shape: ModelShape, retained: float, itemsize: int, block_size: int = DEFAULT_BLOCK_SIZE
) -> KVCapsule:
    """The capsule that `KVCapsule.fit` would make with its defaults, sizes only (meta tensors).

    It answers `module_nbytes` and `break_even_tokens` by the same code as a fitted one.

    Args:
        shape: the model's.
        retained: fraction of each run kept, in (0, 1].
        itemsize: bytes of one number of the KV cache.
        block_size: tokens of a run (N).

    Raises:
        OptionError: `retained` is out of range.
    """
    kept = kept_tokens(retained, block_size)
    codecs, infos = {}, []
    for index, layer in enumerate(shape.layers):
        if layer.holds_capsules:
            heads, size = layer.kv_heads, layer.head_dim
            packed = torch.empty(1, block_size * (block_size + 1) // 2, device="meta")
            mean = torch.empty(2, heads, size, device="meta")
            white = torch.empty(2, heads, size * (size + 1) // 2, device="meta", dtype=torch.bfloat16)
            codecs[index] = HeadsCodec(packed, mean, white, block_size, kept)
            infos.append(LayerInfo(index, kept, layer.kv_heads, layer.head_dim))
    return KVCapsule(codecs, CapsuleInfo("heads", block_size, itemsize, tuple(infos), {}, "", {}, 0))


def capsule_kv_bytes(
    shape: ModelShape, layout: PromptLayout, new_tokens: int, itemsize: int, capsule: KVCapsule
) -> int:
    """Bytes of a capsule cache for the rows of a layout and `new_tokens` tokens generated after each.

    Of M runs of N tokens and E exact prompt tokens: a full-attention layer holds
    `M * Hkv * (r * (2 D * itemsize + 1) + 1)` (position of a kept token, and their number) and
    `2 * (E + new_tokens) * Hkv * D * itemsize`; all layers share `16 * (M + E)` bytes of positions;
    sliding-window layers are as in the full cache.
    """
    plan = CapsulePlan.from_layout(layout, capsule.info.block_size)
    seen = layout.length + new_tokens
    exact = plan.real_tokens(layout.length) - plan.capsule_tokens
    total = INDEX_BYTES * (len(plan.runs) + exact)
    for index, layer in enumerate(shape.layers):
        if not layer.holds_capsules:
            total += layout.batch_size * layer.kv_bytes(min(seen, (layer.window or seen + 1) - 1), itemsize)
            continue
        payload = capsule.stored[index].payload_nbytes(layer.kv_heads, layer.head_dim, itemsize)
        total += round(len(plan.runs) * payload)
        total += layer.kv_bytes(exact + new_tokens * layout.batch_size, itemsize)
    return total


def scratch_bytes(shape: ModelShape, tokens: int, itemsize: int) -> int:
    """Bytes of the buffer that one request of `tokens` tokens is rebuilt into, one layer at a time.

    `1.25 * 2 * tokens * Hkv * D * itemsize` of the largest full-attention layer; transient, but there
    while the request is decoded.
    """
    sizes = [layer.kv_bytes(tokens, itemsize) for layer in shape.layers if layer.holds_capsules]
    return int(SCRATCH_GROWTH * max(sizes, default=0))
