"""Qwen2.5-VL: its prompts are written exactly as Qwen2-VL's are; positions within a video follow its time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import transformers
from packaging.version import Version

from capsight.errors import LayoutError
from capsight.layout.families.base import TokenRow
from capsight.layout.families.qwen2_vl import Qwen2VL
from capsight.layout.row_layout import VisionBlock

_WHOLE_SECONDS = Version(transformers.__version__) < Version("5.18")
"""Whether this transformers cuts the time of a grid step to whole seconds."""


class Qwen25VL(Qwen2VL):
    """Adapter for Qwen2.5-VL, the Qwen2-VL token structure under its own model type."""

    model_types = ("qwen2_5_vl",)

    def blocks(
        self, rows: Sequence[TokenRow], inputs: Mapping[str, Any], config: Any
    ) -> list[list[VisionBlock]]:
        """See `Family.blocks`."""
        by_row = super().blocks(rows, inputs, config)
        if inputs.get("second_per_grid_ts") is None:
            return by_row
        seconds = [float(entry) for entry in inputs["second_per_grid_ts"]]
        videos = sum(block.kind == "video" for blocks in by_row for block in blocks)
        if len(seconds) != videos:
            raise LayoutError(
                f"second_per_grid_ts has {len(seconds)} entries, but the prompts hold {videos} videos; pass "
                "the processor's outputs as they are"
            )
        times = iter(seconds)
        return [
            [replace(b, frame_seconds=next(times)) if b.kind == "video" else b for b in blocks]
            for blocks in by_row
        ]

    def frame_step(self, block: VisionBlock, config: Any) -> float:
        """See `MRope.frame_step`."""
        if block.kind == "image":
            return 1.0
        seconds = 1.0 if block.frame_seconds is None else block.frame_seconds
        seconds = int(seconds) if _WHOLE_SECONDS else seconds
        return float(config.vision_config.tokens_per_second * seconds)
