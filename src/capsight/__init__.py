"""capsight: cheaper vision-language models without retraining.

- `KVCapsule`: vision keys and values kept as small capsules, rebuilt when attention needs them.
- `enable`: runs a model with a capsule; `load_reference_vlm`: a small trained model to try it on.
"""

from importlib.metadata import version

from capsight.errors import CapsightError
from capsight.kvcapsule import CapsuleCache, KVCapsule
from capsight.layout import PromptLayout, build_layout
from capsight.reference import load_reference_vlm
from capsight.runtime import FastModel, enable

__version__ = version("capsight")

__all__ = [
    "CapsightError",
    "CapsuleCache",
    "FastModel",
    "KVCapsule",
    "PromptLayout",
    "build_layout",
    "enable",
    "load_reference_vlm",
]
