"""Bytes of keys and values: of a full cache, and of one with capsules as it would be fitted."""

from __future__ import annotations

import torch

from capsight.kvcapsule import CapsulePlan, KVCapsule
from capsight.kvcapsule.calibration.fit import kept_tokens
from capsight.kvcapsule.calibration.joint_fit import MOST_RANK
from capsight.kvcapsule.codecs import HeadsCodec, JointCodec
from capsight.kvcapsule.codecs.levels import GROUP
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
    shape: ModelShape,
    retained: float,
    itemsize: int,
    block_size: int = DEFAULT_BLOCK_SIZE,
    codec: str = "joint",
) -> KVCapsule:
    """The capsule that `KVCapsule.fit` would make with its defaults, sizes only (meta tensors).

    It answers `module_nbytes` and `break_even_tokens` by the same code as a fitted one.

    Args:
        shape: the model's.
        retained: of a 16-bit cache's bytes ("joint"), or of each run ("heads"), in (0, 1].
        itemsize: bytes of one number of the KV cache.
        block_size: tokens of a run (N); "joint" has none.
        codec: "joint" or "heads".

    Raises:
        OptionError: `retained` is out of range.
    """
    if codec == JointCodec.name:
        return _planned_joint(shape, retained, itemsize)
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


def _planned_joint(shape: ModelShape, retained: float, itemsize: int) -> KVCapsule:
    """The joint codec of a model whose latents need all the bytes they may take."""
    layers = {index: layer for index, layer in enumerate(shape.layers) if layer.holds_capsules}
    numbers = sum(2 * layer.kv_heads * layer.head_dim for layer in layers.values())
    rank = -(-min(MOST_RANK, numbers) // GROUP) * GROUP
    variance = 0.9 ** torch.arange(rank // GROUP, dtype=torch.float64)  # falls, so that all bytes are of use
    pairs = int(min((layer.head_dim for layer in layers.values()), default=0) * shape.turned) // 2
    shared = {
        "lost": variance[:, None] * torch.tensor([1.0, 0.11, 9e-3, 3e-5], dtype=torch.float64),
        "typical": torch.zeros(1),
        "frequencies": torch.ones(pairs, dtype=torch.float64),
        "pairs": torch.zeros(pairs, dtype=torch.int64),
        "turning": torch.tensor([0.0, 1.0, len(layers)]),
        "weight": torch.ones(2),
    }
    codecs = {}
    for index, layer in layers.items():
        size = layer.kv_heads, layer.head_dim
        axes = torch.empty(rank, 2, *size, device="meta", dtype=torch.int8)
        steps = torch.empty(2, rank, device="meta")
        tensors = {"mean": torch.empty(2, *size, device="meta"), "axes": axes, "steps": steps, **shared}
        codecs[index] = JointCodec(tensors, retained)
    infos = tuple(LayerInfo(index, 1, layer.kv_heads, layer.head_dim) for index, layer in layers.items())
    return KVCapsule(codecs, CapsuleInfo("joint", 1, itemsize, infos, {}, "", {}, 0, share=retained))


def capsule_kv_bytes(
    shape: ModelShape, layout: PromptLayout, new_tokens: int, itemsize: int, capsule: KVCapsule
) -> int:
    """Bytes of a capsule cache for the rows of a layout and `new_tokens` tokens generated after each.

    Of M blocks of N tokens in runs, and E exact prompt tokens: with `heads` a full-attention layer holds
    `M * Hkv * (r * (2 D * itemsize + 1) + 1)` (position of a kept token, and their number) and
    `2 * (E + new_tokens) * Hkv * D * itemsize`; with `joint` a vision token takes what is retained of 16 bits
    in all layers together. All layers share 16 bytes of positions a run and an exact token;
    sliding-window layers are as in the full cache.
    """
    block_size = next(iter(capsule.codecs.values())).block_size
    plan = CapsulePlan.from_layout(layout, block_size)
    seen = layout.length + new_tokens
    exact = plan.real_tokens(layout.length) - plan.capsule_tokens
    total: float = INDEX_BYTES * (len(plan.runs) + exact)
    for index, layer in enumerate(shape.layers):
        if not layer.holds_capsules:
            total += layout.batch_size * layer.kv_bytes(min(seen, (layer.window or seen + 1) - 1), itemsize)
            continue
        payload = capsule.stored[index].payload_nbytes(layer.kv_heads, layer.head_dim, itemsize)
        total += plan.capsule_tokens // block_size * payload
        total += layer.kv_bytes(exact + new_tokens * layout.batch_size, itemsize)
    return round(total)


def scratch_bytes(shape: ModelShape, tokens: int, itemsize: int) -> int:
    """Bytes of the buffer that one request of `tokens` tokens is rebuilt into, one layer at a time.

    `1.25 * 2 * tokens * Hkv * D * itemsize` of the largest full-attention layer; transient, but there
    while the request is decoded.
    """
    sizes = [layer.kv_bytes(tokens, itemsize) for layer in shape.layers if layer.holds_capsules]
    return int(SCRATCH_GROWTH * max(sizes, default=0))
