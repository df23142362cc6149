"""Qwen3-VL, Qwen3.5, LFM3-VL: images as in Qwen2-VL; of videos one delimited block per frame.

A timestamp is written before each frame. A frame here is a temporal patch: the vision tower merges two film
frames into one. The chat template already writes delimiters around the video placeholder, so recent
processors leave an outer pair around all frames; it is counted to the first and the last frame.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from capsight.layout.families.base import Supply, TokenRow, check_length, enclosing
from capsight.layout.families.qwen2_vl import merged_grid
from capsight.layout.families.rope import MRope, PlainRope
from capsight.layout.row_layout import Kind, Span, VisionBlock


class Qwen3VL(MRope):
    """Adapter for Qwen3-VL and Qwen3.5, dense and mixture of experts."""

    model_types: tuple[str, ...] = ("qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe")

    def blocks(
        self, rows: Sequence[TokenRow], inputs: Mapping[str, Any], config: Any
    ) -> list[list[VisionBlock]]:
        """See `Family.blocks`."""
        images, videos = Supply(inputs, "image_grid_thw"), Supply(inputs, "video_grid_thw")
        by_row = [self._row(row, images, videos, config) for row in rows]
        images.finish()
        videos.finish()
        return by_row

    def spans(self, row: TokenRow, config: Any) -> list[tuple[Kind, Span]]:
        """Images and video frames of a row, in order."""
        kinds: dict[int, Kind] = {config.image_token_id: "image", config.video_token_id: "video"}
        return [(kinds[row.ids[span[0]]], span) for span in row.runs(*kinds)]

    def pair(self, config: Any) -> tuple[int, int]:
        """Ids of the delimiters around an image and around a frame."""
        return config.vision_start_token_id, config.vision_end_token_id

    def outer_pair(self, config: Any) -> tuple[int, int]:
        """Ids of the delimiters around all frames of a video."""
        return self.pair(config)

    def _row(self, row: TokenRow, images: Supply, videos: Supply, config: Any) -> list[VisionBlock]:
        spans = self.spans(row, config)
        blocks: list[VisionBlock] = []
        image = 0
        while spans:
            kind, (start, _) = spans[0]
            supply = images if kind == "image" else videos
            t, h, w = merged_grid(supply.take(row, start), config)
            frames, spans = spans[:t], spans[t:]
            for _, span in frames:
                check_length(row, span, h * w, f"{supply.key} (merged grid {(1, h, w)} a frame)")
            if len(frames) < t or any(other != kind for other, _ in frames):
                raise row.error(f"{supply.key} calls for {t} frames at {start}, but the prompt holds fewer")
            pairs = [enclosing(row, span, *self.pair(config)) for _, span in frames]
            outer = () if kind == "image" else _outer_pair(row, pairs, *self.outer_pair(config))
            if kind == "video" and not outer and self.outer_pair(config) != self.pair(config):
                raise row.error(
                    f"the video at {start} lacks its start or end token; was the prompt truncated?"
                )
            for index, ((_, span), pair) in enumerate(zip(frames, pairs, strict=True)):
                delimiters = [
                    *pair,
                    *(outer[:1] if index == 0 else ()),
                    *(outer[1:] if index == t - 1 else ()),
                ]
                blocks.append(VisionBlock(*span, kind, (1, h, w), image, tuple(sorted(delimiters))))
            image += 1
        return blocks


class LFM3VL(PlainRope, Qwen3VL):
    """Adapter for LFM3-VL: writes images and frames as Qwen3-VL does; one position a token."""

    model_types = ("lfm3_vl",)


def _outer_pair(row: TokenRow, pairs: list[Span], start: int, end: int) -> tuple[int, ...]:
    """The delimiters around all frames of a video, where the chat template has written them.

    What may lie between an outer and an inner delimiter is a timestamp, so the nearest delimiter is the
    outer one if it is of that kind.
    """
    after, before = pairs[-1][1] + 1, pairs[0][0] - 1
    while row.at(before) not in (None, start, end):
        before -= 1
    while row.at(after) not in (None, start, end):
        after += 1
    return (before, after) if row.at(after) == end and row.at(before) == start else ()
