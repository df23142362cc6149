"""What a user would pick instead of KVCapsule, behind the same interface and at the same bytes.

Every baseline is a method for `capsight.enable(model, capsule=...)` and `capsight.evaluation.evaluate`.
"""

from capsight.baselines.base import Baseline
from capsight.baselines.cur import CUREviction
from capsight.baselines.feature_pca import FeaturePCA
from capsight.baselines.kvzip import KVzip
from capsight.baselines.merge import TokenMerging
from capsight.baselines.positional import StreamingLLM, UniformSubsample
from capsight.baselines.quantized import QuantoInt2, QuantoInt4
from capsight.baselines.snapkv import SnapKV
from capsight.baselines.vl_cache import VLCache

METHODS: dict[str, type[Baseline]] = {
    method.name: method
    for method in (
        UniformSubsample,
        StreamingLLM,
        SnapKV,
        VLCache,
        TokenMerging,
        CUREviction,
        KVzip,
        FeaturePCA,
        QuantoInt4,
        QuantoInt2,
    )
}
"""Baseline classes by name. Those with `calibrated` are made by `fit`, the others from a budget."""

__all__ = [
    "METHODS",
    "Baseline",
    "CUREviction",
    "FeaturePCA",
    "KVzip",
    "QuantoInt2",
    "QuantoInt4",
    "SnapKV",
    "StreamingLLM",
    "TokenMerging",
    "UniformSubsample",
    "VLCache",
]
