"""Tiny random-weight models of every supported family, with real processors, made offline.

`FAMILIES[name]()` builds one (cached: treat it as read-only, or deep-copy the model).
"""

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import pytest

from tiny import (
    cohere2_vision,
    deepseek_vl,
    exaone4_5,
    gemma3,
    gemma4,
    glm4v,
    idefics3,
    internvl,
    lfm2_vl,
    lfm3_vl,
    lighton_ocr,
    llava,
    llava_onevision,
    minicpmv,
    mistral3,
    ovis2,
    paddleocr_vl,
    qwen2_5_vl,
    qwen2_vl,
    qwen3_5,
    qwen3_vl,
    smolvlm,
    video_llama_3,
)
from tiny.base import TinyVLM, clip, picture

_BUILD: dict[str, Callable[[], TinyVLM]] = {
    "qwen2_vl": qwen2_vl.build,
    "qwen2_5_vl": qwen2_5_vl.build,
    "qwen3_vl": qwen3_vl.build,
    "gemma3": gemma3.build,
    "llava_onevision": llava_onevision.build,
    "internvl": internvl.build,
    "smolvlm": smolvlm.build,
    "idefics3": idefics3.build,
    "mistral3": mistral3.build,
    "pixtral": partial(mistral3.build, "pixtral"),
    "paddleocr_vl": paddleocr_vl.build,
    "lfm3_vl": lfm3_vl.build,
    **{name: partial(minicpmv.build, name) for name in minicpmv.CLASSES},
    "lfm2_vl": lfm2_vl.build,
    "cohere2_vision": cohere2_vision.build,
    "ovis2": ovis2.build,
    "exaone4_5": exaone4_5.build,
    "lighton_ocr": lighton_ocr.build,
    "video_llama_3": video_llama_3.build,
    "deepseek_vl": deepseek_vl.build,
    "qianfan_ocr": internvl.build_qianfan,
    **{name: partial(gemma4.build, name) for name in gemma4.CLASSES},
    **{name: partial(qwen3_5.build, name) for name in qwen3_5.CLASSES},
    **{name: partial(glm4v.build, name) for name in glm4v.CLASSES},
    **{name: partial(llava.build, name) for name in llava.CLASSES},
}
FAMILIES: dict[str, Callable[[], TinyVLM]] = {name: cache(build) for name, build in _BUILD.items()}
LIKE_LLAVA = ("lighton_ocr", "video_llama_3", "ovis2", "deepseek_vl", "qianfan_ocr")
KINDS = [name for name in FAMILIES if name not in LIKE_LLAVA]
"""Families without those that cache and number tokens as LLaVA does; layouts, plans and the kit take all."""
CACHES = ["qwen2_5_vl", "gemma3", "gemma4", "lfm3_vl", "minicpmv4_7", "qwen3_5", "cohere2_vision", "internvl"]
"""One family of each kind of cache and positions, for what the families' own code has no part in."""
UNPLANNED = ("minicpmv4_6", "minicpmv4_7")
PLANNED = [name for name in FAMILIES if name not in UNPLANNED]
"""Families that `capsight plan` knows."""


def in_turn(names: str, options: Sequence[Any], families: Sequence[str] = KINDS) -> pytest.MarkDecorator:
    """Runs a test for every family with one of the options, taken in turn; `names` are as in `parametrize`.

    Tests that list the options in another order give a family another one.
    """
    several = "," in names
    taken = [options[i % len(options)] for i in range(len(families))]
    cases = [(f, *(o if several else (o,))) for f, o in zip(families, taken, strict=True)]
    return pytest.mark.parametrize(f"vlm,{names}", cases, indirect=["vlm"])


__all__ = ["CACHES", "FAMILIES", "KINDS", "PLANNED", "TinyVLM", "clip", "in_turn", "picture"]
