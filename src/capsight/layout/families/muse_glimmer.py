"""Muse Glimmer: a start token, the tokens of an image, an end token; a video is one block per frame.

Each frame of a video follows its time, which is text, and has a separator behind it, the last one the end
token. The config holds none of these ids; those around images are read off the prompt and must be the same
everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from capsight.layout.families.base import Supply, TokenRow, check_length
from capsight.layout.families.rope import PlainRope
from capsight.layout.row_layout import Kind, VisionBlock


class MuseGlimmer(PlainRope):
    """Adapter for Muse Glimmer: one block per image or video frame."""

    model_types: tuple[str, ...] = ("muse_glimmer",)

    def blocks(
        self, rows: Sequence[TokenRow], inputs: Mapping[str, Any], config: Any
    ) -> list[list[VisionBlock]]:
        """See `Family.blocks`."""
        images, videos = Supply(inputs, "image_grid_thw"), Supply(inputs, "video_grid_thw")
        merge, pairs = config.vision_config.merge_size, set[tuple[int | None, int | None]]()
        by_row: list[list[VisionBlock]] = []
        for row in rows:
            blocks: list[VisionBlock] = []
            spans, image = row.runs(config.image_token_id, config.video_token_id), 0
            while spans:
                start, token = spans[0][0], row.ids[spans[0][0]]
                kind: Kind = "image" if token == config.image_token_id else "video"
                supply = images if kind == "image" else videos
                t, h, w = supply.take(row, start)
                grid = (1, h // merge, w // merge)
                frames, spans = spans[:t], spans[t:]
                if len(frames) < t or any(row.ids[first] != token for first, _ in frames):
                    raise row.error(f"{supply.key} calls for {t} frames at {start}, but there are fewer")
                for first, end in frames:
                    check_length(row, (first, end), grid[1] * grid[2], f"{supply.key} (merged grid {grid})")
                    delimiters = (first - 1, end) if kind == "image" else (end,)
                    if kind == "image":
                        pairs.add((row.at(first - 1), row.at(end)))
                    if row.at(end) is None or len(pairs) > 1 or None in set().union(*pairs):
                        raise row.error(
                            f"the vision tokens at {first} are not enclosed as others are; build the prompt "
                            "with the model's own processor, and see that it was not truncated"
                        )
                    blocks.append(VisionBlock(first, end, kind, grid, image, delimiters))
                image += 1
            by_row.append(blocks)
        images.finish()
        videos.finish()
        return by_row
