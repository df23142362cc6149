"""From how many vision tokens on a capsule pays for its modules."""

from __future__ import annotations

from collections.abc import Mapping

from capsight.kvcapsule.codecs import LayerCodec, QuantisedCodec
from capsight.kvcapsule.info import CapsuleInfo

_INDEX_NBYTES = 16  # of a run in `Placement`: row and start, shared by all layers


def break_even_tokens(
    info: CapsuleInfo, stored: Mapping[int, LayerCodec | QuantisedCodec], module_nbytes: int, batch: int
) -> int | None:
    """Vision tokens per row from which capsules and modules together are smaller than the full cache.

    Args:
        info: of the capsule.
        stored: what caches use for each layer.
        module_nbytes: bytes of what was learnt.
        batch: rows that share the modules.

    Returns:
        The smallest such number of tokens, a multiple of the block size; None if capsules save nothing.
    """
    size, item, saved = info.block_size, info.itemsize, 0.0
    if size > 1:  # a run of single tokens is a whole image
        saved -= _INDEX_NBYTES
    for layer in info.layers:
        full = 2 * size * layer.heads * layer.head_dim * item
        saved += full - stored[layer.index].payload_nbytes(layer.heads, layer.head_dim, item)
    return size * int(module_nbytes // (saved * batch) + 1) if saved > 0 else None
