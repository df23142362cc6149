"""SmolVLM and Idefics3: each tile is `<fake_token_around_image>` its tag, then its image tokens.

The tag is `<row_1_col_2>` (one token in SmolVLM, several in Idefics3) or, for the whole picture that
comes last, `<global-img>`; a fake token closes the image after it. The config holds none of these
ids, so they are read off the prompt: the token after a row's last image token is the fake token, and
what stands between it and the image tokens is the tag.

A video frame is written as an image after its timestamp: each is an image here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from capsight.errors import LayoutError
from capsight.layout.families.base import TokenRow, check_length, square
from capsight.layout.families.rope import PlainRope
from capsight.layout.row_layout import Span, VisionBlock

LONGEST_TAG = 16
"""No tokenizer splits `<row_6_col_6>` or `<global-img>` into more tokens than this."""


class SmolVLM(PlainRope):
    """Adapter for SmolVLM and Idefics3: one square block per tile, the whole picture last."""

    model_types: tuple[str, ...] = ("smolvlm", "idefics3")

    def blocks(
        self, rows: Sequence[TokenRow], inputs: Mapping[str, Any], config: Any
    ) -> list[list[VisionBlock]]:
        """See `Family.blocks`."""
        vision = config.vision_config
        tokens = (vision.image_size // vision.patch_size // config.scale_factor) ** 2
        by_row: list[list[VisionBlock]] = []
        last_tags: set[tuple[int, ...]] = set()
        other_tags: set[tuple[int, ...]] = set()
        for row in rows:
            spans = row.runs(config.image_token_id)
            for span in spans:
                check_length(row, span, tokens, f"the vision tower ({tokens} a tile)")
            groups = _images(row, spans) if spans else []
            by_row.append(_blocks(groups, tokens))
            last_tags |= {_tag(row, group[-1]) for group in groups}
            other_tags |= {_tag(row, tile) for group in groups for tile in group[:-1]}
            if len(last_tags) > 1 or last_tags & other_tags:
                raise row.error(
                    "the last tile of each image, and no other, carries the tag of the whole picture; "
                    "build the prompt with the model's own processor"
                )
        _check_tiles(inputs, [len(blocks) for blocks in by_row])
        return by_row


def _check_tiles(inputs: Mapping[str, Any], tiles: list[int]) -> None:
    """Check `pixel_values`: (rows, most tiles of any row, C, H, W), or (videos, frames, C, H, W)."""
    pixels = inputs.get("pixel_values")
    if pixels is None:
        return
    counts = [len(row) for row in pixels]
    if max(counts) != max(tiles) and sum(counts) != sum(tiles):
        raise LayoutError(
            f"pixel_values holds up to {max(counts)} tiles a row, but the prompts hold vision tokens for up "
            f"to {max(tiles)}; the prompt was truncated or a placeholder is missing"
        )


class _Tile:
    """Where one tile lies: its image tokens and its delimiters."""

    def __init__(self, span: Span, opener: int) -> None:
        self.span, self.delimiters = span, tuple(range(opener, span[0]))


def _images(row: TokenRow, spans: list[Span]) -> list[list[_Tile]]:
    """The tiles of the row, grouped by image."""
    fake = row.at(spans[-1][1])
    if fake is None:
        raise row.error("the prompt ends inside an image; raise max_length or turn truncation off")
    groups: list[list[_Tile]] = []
    previous = row.pad_left
    for span in spans:
        fakes = [p for p in range(previous, span[0]) if row.ids[p] == fake]
        if not fakes or not 1 < span[0] - fakes[-1] <= LONGEST_TAG + 1:
            raise row.error(
                f"image tokens at {span[0]} are not preceded by the fake image token and a tag; "
                "build the prompt with the model's own processor"
            )
        tile = _Tile(span, fakes[-1])
        if not groups or len(fakes) > 1:
            if groups:
                _close(row, groups[-1][-1], fake)
            groups.append([tile])
        else:
            groups[-1].append(tile)
        previous = span[1]
    _close(row, groups[-1][-1], fake)
    return groups


def _close(row: TokenRow, tile: _Tile, fake: int) -> None:
    if row.at(tile.span[1]) != fake:
        raise row.error(
            f"image tokens at {tile.span[0]} are not followed by the fake image token; "
            "build the prompt with the model's own processor"
        )
    tile.delimiters += (tile.span[1],)


def _tag(row: TokenRow, tile: _Tile) -> tuple[int, ...]:
    return tuple(row.ids[d] for d in tile.delimiters[1:] if d < tile.span[0])


def _blocks(groups: list[list[_Tile]], tokens: int) -> list[VisionBlock]:
    return [
        VisionBlock(*tile.span, "image", square(tokens), image, tile.delimiters)
        for image, group in enumerate(groups)
        for tile in group
    ]
