"""Which adapter reads which model: the registry, keyed by `config.model_type`."""

from __future__ import annotations

from typing import Any

from capsight.errors import UnsupportedModelError
from capsight.layout.families.base import Family
from capsight.layout.families.gemma3 import Gemma3
from capsight.layout.families.glm4v import Glm4V
from capsight.layout.families.internvl import InternVL
from capsight.layout.families.llava import Llava
from capsight.layout.families.llava_next import LlavaNext
from capsight.layout.families.llava_onevision import LlavaOnevision
from capsight.layout.families.mistral3 import Mistral3
from capsight.layout.families.paddleocr_vl import PaddleOCRVL
from capsight.layout.families.qwen2_5_vl import Qwen25VL
from capsight.layout.families.qwen2_vl import Qwen2VL
from capsight.layout.families.qwen3_vl import Qwen3VL
from capsight.layout.families.smolvlm import SmolVLM

_ADAPTERS: tuple[Family, ...] = (
    Qwen2VL(),
    Qwen25VL(),
    Qwen3VL(),
    Gemma3(),
    LlavaOnevision(),
    InternVL(),
    SmolVLM(),
    Glm4V(),
    Mistral3(),
    PaddleOCRVL(),
    Llava(),
    LlavaNext(),
)
_BY_MODEL_TYPE: dict[str, Family] = {name: family for family in _ADAPTERS for name in family.model_types}


def supported_families() -> tuple[str, ...]:
    """The values of `config.model_type` that capsight can read, sorted."""
    return tuple(sorted(_BY_MODEL_TYPE))


def family_for(config: Any) -> Family:
    """The adapter for a model's config.

    Raises:
        UnsupportedModelError: no adapter knows `config.model_type`.
    """
    model_type = getattr(config, "model_type", None)
    if model_type not in _BY_MODEL_TYPE:
        raise UnsupportedModelError(
            f"no layout adapter for model type {model_type!r}; supported: {', '.join(supported_families())}. "
            "Pass the config of the whole vision-language model (model.config), not of its text model."
        )
    return _BY_MODEL_TYPE[model_type]
