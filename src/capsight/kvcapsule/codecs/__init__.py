"""Codecs: `adaptive` (default), `static`, and the control `evict`, behind one small interface.

`QuantisedCodec` goes around any of them.
"""

from capsight.kvcapsule.codecs.adaptive import AdaptiveCodec
from capsight.kvcapsule.codecs.base import LayerCodec
from capsight.kvcapsule.codecs.block import BlockCodec, Payload
from capsight.kvcapsule.codecs.evict import EvictCodec
from capsight.kvcapsule.codecs.quantised import QuantisedCodec
from capsight.kvcapsule.codecs.static import StaticCodec

CODECS: dict[str, type[LayerCodec]] = {
    codec.name: codec for codec in (AdaptiveCodec, StaticCodec, EvictCodec)
}
"""Codec classes by name."""

__all__ = [
    "CODECS",
    "AdaptiveCodec",
    "BlockCodec",
    "EvictCodec",
    "LayerCodec",
    "Payload",
    "QuantisedCodec",
    "StaticCodec",
]
