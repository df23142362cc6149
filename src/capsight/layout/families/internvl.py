"""InternVL: `<img>` all tiles of an image, one after the other, then its thumbnail, `</img>`.

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
from capsight.layout.row_layout import Span, VisionBlock


class InternVL:
    """Adapter for InternVL: one square block per tile; the tiles of an image touch."""

    model_types: tuple[str, ...] = ("internvl",)

    def blocks(
        self, rows: Sequence[TokenRow], inputs: Mapping[str, Any], config: Any
    ) -> list[list[VisionBlock]]:
        """See `Family.blocks`."""
        runs = [(row, span) for row in rows for span in row.runs(config.image_token_id)]
        found: list[list[VisionBlock]] = [[] for _ in rows]
        numbers = {id(row): number for number, row in enumerate(rows)}
        if runs:
            pair = _delimiter_ids(rows, runs, config)
            for row, span in runs:
                blocks = found[numbers[id(row)]]
                blocks += _tiles(row, span, pair, blocks[-1].image + 1 if blocks else 0, config)
        check_pictures(inputs, sum(len(blocks) for blocks in found))
        return found


def _tiles(row: TokenRow, span: Span, pair: Span, image: int, config: Any) -> list[VisionBlock]:
    per_tile = config.image_seq_length
    tiles = (span[1] - span[0]) // per_tile
    check_length(row, span, max(tiles, 1) * per_tile, f"config.image_seq_length ({per_tile} a tile)")
    opener, closer = enclosing(row, span, *pair)
    blocks: list[VisionBlock] = []
    for tile in range(tiles):
        start = span[0] + tile * per_tile
        delimiters = ((opener,) if tile == 0 else ()) + ((closer,) if tile == tiles - 1 else ())
        blocks.append(VisionBlock(start, start + per_tile, "image", square(per_tile), image, delimiters))
    return blocks


def _delimiter_ids(rows: Sequence[TokenRow], runs: list[tuple[TokenRow, Span]], config: Any) -> Span:
    start = getattr(config, "start_image_token_id", None)
    end = getattr(config, "end_image_token_id", None)
    if start is not None and end is not None:
        return start, end
    row, span = runs[0]
    opener, closer = row.at(span[0] - 1), row.at(span[1])
    for number in (opener, closer):
        uses = sum(r.ids[r.pad_left :].count(number) for r in rows) if number is not None else 0
        if opener == closer or uses != len(runs):
            what = "cut off" if number is None else f"{opener} and {closer} stand around the first image"
            raise row.error(
                f"the images are not each enclosed in <img> and </img> ({what}; the pair must stand "
                "around every image and nowhere else); build the prompt with the model's own chat "
                "template and processor, without truncation"
            )
    assert opener is not None
    assert closer is not None
    return opener, closer
