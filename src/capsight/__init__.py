"""capsight: cheaper vision-language models without retraining.

- `KVCapsule`: vision keys and values kept as small capsules, rebuilt when attention needs them.
- `BlindSight`: prefill attention that skips what the heads of a model do not use between images.
- `enable`: runs a model with either or both; `compiled_steps`: with decode steps in a graph.
- `load_reference_vlm`: a small trained model to try it on.
"""

from importlib.metadata import version

from capsight.blindsight import BlindSight, HeadMap
from capsight.errors import CapsightError
from capsight.kvcapsule import CapsuleCache, CapsuleConfig, KVCapsule
from capsight.kvcapsule.rest import CapsuleStore
from capsight.layout import PromptLayout, build_layout
from capsight.processors import load_processor
from capsight.reference import load_reference_vlm
from capsight.runtime import FastModel, compiled_steps, enable

__version__ = version("capsight")

__all__ = [
    "BlindSight",
    "CapsightError",
    "CapsuleCache",
    "CapsuleConfig",
    "CapsuleStore",
    "FastModel",
    "HeadMap",
    "KVCapsule",
    "PromptLayout",
    "build_layout",
    "compiled_steps",
    "enable",
    "load_processor",
    "load_reference_vlm",
]
