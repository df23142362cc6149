"""KVCapsule: vision keys and values kept as small capsules, rebuilt when attention needs them.

plan (which tokens) -> moments, fit (calibration) -> codecs (encode, decode) -> layer, cache (generate).
"""

from capsight.kvcapsule.cache import CapsuleCache
from capsight.kvcapsule.calibration.config import CapsuleConfig
from capsight.kvcapsule.capsule import KVCapsule
from capsight.kvcapsule.method import CacheMethod, ContextRepeater, LatentMethod, QueryObserver
from capsight.kvcapsule.plan import CapsulePlan, Run

__all__ = [
    "CacheMethod",
    "CapsuleCache",
    "CapsuleConfig",
    "CapsulePlan",
    "ContextRepeater",
    "KVCapsule",
    "LatentMethod",
    "QueryObserver",
    "Run",
]
