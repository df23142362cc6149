"""Which adapter reads which model: the registry, keyed by `config.model_type`."""

from __future__ import annotations

from functools import cache
from importlib.metadata import entry_points
from typing import Any

from capsight.errors import UnsupportedModelError
from capsight.layout.families.base import Family
from capsight.layout.families.cohere2_vision import Cohere2Vision
from capsight.layout.families.counted import Counted
from capsight.layout.families.gemma3 import Gemma3
from capsight.layout.families.gemma4 import Gemma4
from capsight.layout.families.glm4v import Glm4V
from capsight.layout.families.internvl import InternVL
from capsight.layout.families.lfm2_vl import LFM2VL
from capsight.layout.families.llava import Llava
from capsight.layout.families.llava_next import LlavaNext
from capsight.layout.families.llava_onevision import LlavaOnevision
from capsight.layout.families.minicpmv import MiniCPMV46
from capsight.layout.families.minicpmv4_7 import MiniCPMV47
from capsight.layout.families.mistral3 import Mistral3
from capsight.layout.families.muse_glimmer import MuseGlimmer
from capsight.layout.families.ovis2 import Ovis2
from capsight.layout.families.qwen2_5_vl import Qwen25VL
from capsight.layout.families.qwen2_vl import Qwen2VL
from capsight.layout.families.qwen3_vl import LFM3VL, Qwen3VL
from capsight.layout.families.refused import reason
from capsight.layout.families.smolvlm import SmolVLM

_ADAPTERS: tuple[Family, ...] = (
    Qwen2VL(),
    Qwen25VL(),
    Qwen3VL(),
    Gemma3(),
    Gemma4(),
    LlavaOnevision(),
    InternVL(),
    SmolVLM(),
    Glm4V(),
    Mistral3(),
    Llava(),
    LlavaNext(),
    LFM3VL(),
    MiniCPMV46(),
    MiniCPMV47(),
    LFM2VL(),
    Cohere2Vision(),
    Ovis2(),
    MuseGlimmer(),
    Counted(),
)
_BY_MODEL_TYPE: dict[str, Family] = {name: family for family in _ADAPTERS for name in family.model_types}

ENTRY_POINTS = "capsight.families"
"""Entry-point group under which other packages register adapters: a `Family`, or what makes one if called."""


@cache
def _registered() -> dict[str, Family]:
    """All adapters by model type: those of this package, and those that other packages add."""
    adapters = dict(_BY_MODEL_TYPE)
    for point in entry_points(group=ENTRY_POINTS):
        try:
            made = point.load()
            family: Family = made() if callable(made) else made
            added = dict.fromkeys(family.model_types, family)
        except Exception as error:
            raise UnsupportedModelError(
                f"the entry point {point.name!r} of {ENTRY_POINTS} cannot be used ({error!r}); repair or "
                "remove the package that registers it"
            ) from error
        taken = sorted(added.keys() & adapters.keys())
        if taken:
            raise UnsupportedModelError(
                f"the entry point {point.name!r} of {ENTRY_POINTS} registers {taken[0]}, which is taken"
            )
        adapters |= added
    return adapters


def supported_families() -> tuple[str, ...]:
    """The values of `config.model_type` that capsight can read, sorted.

    Raises:
        UnsupportedModelError: a registered adapter of another package cannot be loaded.
    """
    return tuple(sorted(_registered()))


def family_for(config: Any) -> Family:
    """The adapter for a model's config.

    Raises:
        UnsupportedModelError: no adapter knows `config.model_type`, or the adapter refuses this config.
    """
    model_type = getattr(config, "model_type", None)
    family = _BY_MODEL_TYPE.get(str(model_type)) or _registered().get(str(model_type))
    if family is None:
        raise UnsupportedModelError(f"{reason(config)}; supported are {', '.join(supported_families())}")
    refusal = family.refusal(config)
    if refusal is not None:
        raise UnsupportedModelError(f"{refusal}; capsight cannot run it")
    return family
