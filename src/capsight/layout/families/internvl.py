"""InternVL, Qianfan-OCR: `<img>` all tiles of an image, one after the other, then its thumbnail, `</img>`.

The config does not hold the ids of the two delimiters, so they are read off the prompt: one and the
same pair stands directly around every image and nowhere else. Where `config.start_image_token_id`
and `config.end_image_token_id` are set, those ids are demanded instead.

A video frame is written as `Frame1: <img>...</img>` with the image token: each is an image here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from capsight.layout.families.base import (
    TokenRow,
    check_length,
    check_pictures,
    enclosing,
    square,
)
from capsight.layout.families.rope import PlainRope
from capsight.layout.row_layout import Span, VisionBlock


class InternVL(PlainRope):
    """Adapter for InternVL: one square block per tile; the tiles of an image touch."""

    model_types: tuple[str, ...] = ("internvl", "qianfan_ocr")

    def blocks(
        self, rows: Sequence[TokenRow], inputs: Mapping[str, Any], config: Any
    ) -> list[list[VisionBlock]]:
        """See `Family.blocks`."""
        runs = [(row, span) for row in rows for span in row.runs(config.image_token_id)]
        for row, span in runs:
            _check_run(row, span, config.image_seq_length)
        pair = _delimiter_ids(rows, runs, config) if runs else None
        by_row: list[list[VisionBlock]] = []
        for row in rows:
            blocks: list[VisionBlock] = []
            for image, span in enumerate(row.runs(config.image_token_id)):
                assert pair is not None
                blocks += _tiles(span, enclosing(row, span, *pair), image, config.image_seq_length)
            by_row.append(blocks)
        check_pictures(inputs, sum(len(blocks) for blocks in by_row))
        return by_row


def _check_run(row: TokenRow, span: Span, per_tile: int) -> None:
    expected = max((span[1] - span[0]) // per_tile, 1) * per_tile
    check_length(row, span, expected, f"config.image_seq_length ({per_tile} a tile)")
    if span[1] == len(row.ids):
        raise row.error(
            f"the prompt ends with the vision tokens at {span[0]}, without </img>; it was truncated: "
            "raise max_length or turn truncation off"
        )


def _tiles(span: Span, pair: Span, image: int, per_tile: int) -> list[VisionBlock]:
    blocks: list[VisionBlock] = []
    for start in range(span[0], span[1], per_tile):
        end = start + per_tile
        delimiters = (pair[:1] if start == span[0] else ()) + (pair[1:] if end == span[1] else ())
        blocks.append(VisionBlock(start, end, "image", square(per_tile), image, delimiters))
    return blocks


def _delimiter_ids(rows: Sequence[TokenRow], runs: list[tuple[TokenRow, Span]], config: Any) -> Span:
    start = getattr(config, "start_image_token_id", None)
    end = getattr(config, "end_image_token_id", None)
    if start is not None and end is not None:
        return start, end
    row, span = runs[0]
    pair = row.at(span[0] - 1), row.at(span[1])
    uses = [sum(r.ids[r.pad_left :].count(number) for r in rows) for number in pair if number is not None]
    if pair[0] is None or pair[1] is None or pair[0] == pair[1] or uses != [len(runs)] * 2:
        raise row.error(
            f"the images are not each enclosed in <img> and </img>: {pair[0]} and {pair[1]} stand around the "
            "first one, but not around every image and nowhere else; build the prompt with the model's own "
            "chat template and processor"
        )
    return pair[0], pair[1]
