"""Qwen2.5-VL: its prompts are written exactly as Qwen2-VL's are."""

from __future__ import annotations

from capsight.layout.families.qwen2_vl import Qwen2VL


class Qwen25VL(Qwen2VL):
    """Adapter for Qwen2.5-VL, the Qwen2-VL token structure under its own model type."""

    model_types = ("qwen2_5_vl",)
