"""Codecs: `joint` (default), `heads`, `adaptive`, `evict`, `static`, `static-mlp`, behind an interface.

`QuantisedCodec` goes around any of them.
"""

from collections import ChainMap
from collections.abc import Mapping

from capsight.kvcapsule.codecs.adaptive import AdaptiveCodec
from capsight.kvcapsule.codecs.base import LayerCodec
from capsight.kvcapsule.codecs.block import BlockCodec, Payload
from capsight.kvcapsule.codecs.evict import EvictCodec
from capsight.kvcapsule.codecs.heads import HeadsCodec
from capsight.kvcapsule.codecs.joint import JointCodec
from capsight.kvcapsule.codecs.positions import TokenPositions
from capsight.kvcapsule.codecs.quantised import QuantisedCodec
from capsight.kvcapsule.codecs.ragged import RaggedPayload
from capsight.kvcapsule.codecs.static import StaticCodec
from capsight.kvcapsule.codecs.static_mlp import StaticMlpCodec

CODECS: dict[str, type[LayerCodec]] = {
    codec.name: codec for codec in (HeadsCodec, AdaptiveCodec, EvictCodec, StaticCodec, StaticMlpCodec)
}
"""Codecs that are fitted layer by layer, by name."""
ALL_CODECS: Mapping[str, type[LayerCodec]] = ChainMap({JointCodec.name: JointCodec}, CODECS)
"""Those as they are now, and the one that is fitted to all layers at once."""

__all__ = [
    "ALL_CODECS",
    "CODECS",
    "AdaptiveCodec",
    "BlockCodec",
    "EvictCodec",
    "HeadsCodec",
    "JointCodec",
    "LayerCodec",
    "Payload",
    "QuantisedCodec",
    "RaggedPayload",
    "StaticCodec",
    "StaticMlpCodec",
    "TokenPositions",
]
