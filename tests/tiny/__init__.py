"""Tiny random-weight models of every supported family, with real processors, made offline.

`FAMILIES[name]()` builds one (cached: treat it as read-only, or deep-copy the model).
"""

from collections.abc import Callable, Sequence
from functools import cache, partial
from importlib import import_module
from typing import Any

import pytest
import transformers
from packaging.version import Version

from tiny.base import TinyVLM, clip, picture

COMPLETE = Version("5.23")
"""The transformers that has every family; older ones lack some, or want torchvision for them."""

_OF_SEVERAL = {
    "mistral3": ("pixtral",),
    "minicpmv": ("minicpmv4_6", "minicpmv4_7"),
    "gemma4": ("gemma4", "gemma4_unified"),
    "qwen3_5": ("qwen3_5", "qwen3_5_moe"),
    "glm4v": ("glm4v", "glm4v_moe", "glm46v", "glm_ocr"),
    "llava": ("llava", "vipllava", "llava_next"),
}
_ALONE = (
    *("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "gemma3", "llava_onevision", "internvl", "smolvlm", "idefics3"),
    *(
        "mistral3",
        "paddleocr_vl",
        "lfm3_vl",
        "lfm2_vl",
        "cohere2_vision",
        "ovis2",
        "exaone4_5",
        "lighton_ocr",
    ),
    *("video_llama_3", "deepseek_vl", "muse_glimmer"),
)
_BUILD: dict[str, tuple[str, ...]] = {
    **{name: (name, "build") for name in _ALONE},
    "qianfan_ocr": ("internvl", "build_qianfan"),
    **{name: (module, "build", name) for module, names in _OF_SEVERAL.items() for name in names},
}
"""Module, function and arguments."""


_AS_BUILT: dict[str, tuple[TinyVLM, list[str]]] = {}


@cache
def _built(name: str) -> TinyVLM:
    module, function, *arguments = _BUILD[name]
    try:
        vlm = getattr(import_module(f"tiny.{module}"), function)(*arguments)
    except ImportError as error:
        if Version(transformers.__version__) >= COMPLETE:
            raise
        pytest.skip(f"transformers {transformers.__version__} has no {name} without torchvision: {error}")
    _AS_BUILT[name] = vlm, vlm.state()
    return vlm


def changed() -> dict[str, list[str]]:
    """What has become of shared models since they were built, or since this was called; nothing should."""
    found = {}
    for name, (vlm, before) in _AS_BUILT.items():
        now = vlm.state()
        if now != before:
            found[name] = sorted(set(now) ^ set(before))
            _AS_BUILT[name] = vlm, now
    return found


FAMILIES: dict[str, Callable[[], TinyVLM]] = {name: partial(_built, name) for name in _BUILD}
LIKE_LLAVA = ("lighton_ocr", "video_llama_3", "ovis2", "deepseek_vl", "qianfan_ocr", "muse_glimmer")
KINDS = [name for name in FAMILIES if name not in LIKE_LLAVA]
"""Families without those that cache and number tokens as another; layouts, plans and the kit take all."""
CACHES = ["qwen2_5_vl", "gemma3", "gemma4", "lfm3_vl", "minicpmv4_7", "qwen3_5", "cohere2_vision", "internvl"]
"""One family of each kind of cache and positions, for what the families' own code has no part in."""


def in_turn(names: str, options: Sequence[Any], families: Sequence[str] = KINDS) -> pytest.MarkDecorator:
    """Runs a test for every family with one of the options, taken in turn; `names` are as in `parametrize`.

    Tests that list the options in another order give a family another one.
    """
    several = "," in names
    taken = [options[i % len(options)] for i in range(len(families))]
    cases = [(f, *(o if several else (o,))) for f, o in zip(families, taken, strict=True)]
    return pytest.mark.parametrize(f"vlm,{names}", cases, indirect=["vlm"])


__all__ = ["CACHES", "COMPLETE", "FAMILIES", "KINDS", "TinyVLM", "changed", "clip", "in_turn", "picture"]
