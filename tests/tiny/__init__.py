"""Tiny random-weight models of every supported family, with real processors, made offline.

`FAMILIES[name]()` builds one (cached: treat it as read-only, or deep-copy the model).
"""

from collections.abc import Callable
from functools import cache

from tiny import (
    gemma3,
    idefics3,
    internvl,
    llava_onevision,
    qwen2_5_vl,
    qwen2_vl,
    qwen3_vl,
    smolvlm,
)
from tiny.base import TinyVLM, clip, picture

FAMILIES: dict[str, Callable[[], TinyVLM]] = {
    "qwen2_vl": cache(qwen2_vl.build),
    "qwen2_5_vl": cache(qwen2_5_vl.build),
    "qwen3_vl": cache(qwen3_vl.build),
    "gemma3": cache(gemma3.build),
    "llava_onevision": cache(llava_onevision.build),
    "internvl": cache(internvl.build),
    "smolvlm": cache(smolvlm.build),
    "idefics3": cache(idefics3.build),
}

__all__ = ["FAMILIES", "TinyVLM", "clip", "picture"]
