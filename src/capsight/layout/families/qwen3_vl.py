"""Qwen3-VL: images as in Qwen2-VL; a video is one delimited block per frame, each after its timestamp.

A frame here is a temporal patch: the vision tower merges two film frames into one. The chat template
already writes delimiters around the video placeholder, so recent processors leave an outer pair
around all frames; it is counted to the first and the last frame.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from capsight.layout.families.base import Supply, TokenRow, check_length, enclosing
from capsight.layout.families.qwen2_vl import merged_grid
from capsight.layout.families.rope import MRope
from capsight.layout.row_layout import Kind, Span, VisionBlock


class Qwen3VL(MRope):
    """Adapter for Qwen3-VL, dense and mixture of experts."""

    model_types: tuple[str, ...] = ("qwen3_vl", "qwen3_vl_moe")

    def blocks(
        self, rows: Sequence[TokenRow], inputs: Mapping[str, Any], config: Any
    ) -> list[list[VisionBlock]]:
        """See `Family.blocks`."""
        images, videos = Supply(inputs, "image_grid_thw"), Supply(inputs, "video_grid_thw")
        found = [self._row(row, images, videos, config) for row in rows]
        images.finish()
        videos.finish()
        return found

    def _row(self, row: TokenRow, images: Supply, videos: Supply, config: Any) -> list[VisionBlock]:
        spans = row.runs(config.image_token_id, config.video_token_id)
        blocks: list[VisionBlock] = []
        image = 0
        while spans:
            is_image = row.ids[spans[0][0]] == config.image_token_id
            kind: Kind = "image" if is_image else "video"
            supply = images if is_image else videos
            t, h, w = merged_grid(supply.take(row, spans[0][0]), config)
            frames, spans = spans[:t], spans[t:]
            for span in frames:
                check_length(row, span, h * w, f"{supply.key} (merged grid {(1, h, w)} a frame)")
            if len(frames) < t or any(row.ids[start] != row.ids[frames[0][0]] for start, _ in frames):
                raise row.error(
                    f"{supply.key} calls for {t} frames at {frames[0][0]}, but the prompt holds fewer"
                )
            pairs = [
                enclosing(row, span, config.vision_start_token_id, config.vision_end_token_id)
                for span in frames
            ]
            outer = () if is_image else _outer_pair(row, pairs, config)
            for index, (span, pair) in enumerate(zip(frames, pairs, strict=True)):
                own = [*pair, *(outer[:1] if index == 0 else ()), *(outer[1:] if index == t - 1 else ())]
                blocks.append(VisionBlock(*span, kind, (1, h, w), image, tuple(sorted(own))))
            image += 1
        return blocks


def _outer_pair(row: TokenRow, pairs: list[Span], config: Any) -> tuple[int, ...]:
    """The delimiters around all frames of a video, where the chat template has written them.

    What may lie between the outer start and the first frame's own is the timestamp, so the nearest
    delimiter before it is the outer one if it is a start; the outer end directly follows.
    """
    start, end = config.vision_start_token_id, config.vision_end_token_id
    after = pairs[-1][1] + 1
    before = pairs[0][0] - 1
    while row.at(before) not in (None, start, end):
        before -= 1
    return (before, after) if row.at(after) == end and row.at(before) == start else ()
