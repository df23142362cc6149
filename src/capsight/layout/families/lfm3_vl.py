"""LFM3-VL: images and video frames are written as Qwen3-VL's; its language model has one position a token."""

from __future__ import annotations

from capsight.layout.families.qwen3_vl import Qwen3VL
from capsight.layout.families.rope import PlainRope


class LFM3VL(PlainRope, Qwen3VL):
    """Adapter for LFM3-VL."""

    model_types = ("lfm3_vl",)
