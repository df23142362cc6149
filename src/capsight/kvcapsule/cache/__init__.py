"""The cache that `generate()` uses: exact rows for text, capsules for image blocks."""

from capsight.kvcapsule.cache.cache import CapsuleCache
from capsight.kvcapsule.cache.stock import full_attention_layers

__all__ = ["CapsuleCache", "full_attention_layers"]
