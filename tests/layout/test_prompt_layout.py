"""PromptLayout by example: what each helper returns, and every message a wrong layout raises."""

import json
from dataclasses import FrozenInstanceError

import pytest

from capsight.errors import LayoutError
from capsight.layout import PromptLayout, RowLayout, VisionBlock

FIRST = VisionBlock(3, 7, "image", (1, 2, 2), 0, (2, 7))
TILES = (VisionBlock(9, 13, "image", (1, 2, 2), 1, (8,)), VisionBlock(13, 17, "image", (1, 2, 2), 1, (17,)))
CLIP = VisionBlock(4, 12, "video", (2, 2, 2), 0, (3, 12))
ROW = RowLayout(20, 1, (FIRST, *TILES))
LAYOUT = PromptLayout((ROW, RowLayout(20, 2, (CLIP,)), RowLayout(20, 5)))


def test_spans_and_counts_of_a_row():
    assert ROW.text_spans == ((1, 3), (7, 9), (17, 20))
    assert ROW.delimiters == (2, 7, 8, 17)
    assert (ROW.vision_tokens, ROW.text_tokens, ROW.num_images, ROW.num_videos) == (12, 7, 2, 0)
    assert ROW.block_at(13) is TILES[1]
    assert ROW.block_at(7) is None
    assert ROW.image_blocks(1) == TILES


def test_counts_of_a_batch():
    assert (LAYOUT.batch_size, LAYOUT.length, LAYOUT.vision_tokens) == (3, 20, 20)
    assert (LAYOUT.num_images, LAYOUT.num_videos) == (2, 1)


def test_last_vision_end_includes_delimiters():
    assert LAYOUT.last_vision_end == 18
    assert LAYOUT.select([1]).last_vision_end == 13
    assert LAYOUT.select([2]).last_vision_end == 0


def test_prefix_cuts_between_blocks():
    cut = LAYOUT.select([0]).prefix(8)
    assert cut.rows[0] == RowLayout(8, 1, (FIRST,))
    assert LAYOUT.select([0]).prefix(7).rows[0].blocks[0].delimiters == (2,)
    assert LAYOUT.select([2]).prefix(3).rows[0] == RowLayout(3, 3)


def test_prefix_through_a_block_is_refused():
    with pytest.raises(LayoutError, match=r"cuts the vision block \[3, 7\); split before 3 or from 7 on"):
        LAYOUT.prefix(5)
    with pytest.raises(LayoutError, match="of a row of 20 tokens"):
        LAYOUT.prefix(21)


def test_extended_adds_text():
    longer = LAYOUT.extended(4)
    assert longer.length == 24
    assert longer.rows[0].blocks == ROW.blocks
    assert longer.rows[0].text_spans[-1] == (17, 24)
    with pytest.raises(LayoutError, match="prefix"):
        LAYOUT.extended(-1)


def test_select_and_repeat_order_rows_as_torch_does():
    assert LAYOUT.select([2, 0, 0]).rows == (LAYOUT.rows[2], ROW, ROW)
    assert LAYOUT.select([0, 2]).repeat(2).rows == (ROW, ROW, LAYOUT.rows[2], LAYOUT.rows[2])
    for rows in ([3], [-1]):
        with pytest.raises(LayoutError, match="do not exist"):
            LAYOUT.select(rows)
    with pytest.raises(LayoutError, match="at least one row"):
        LAYOUT.select([])
    with pytest.raises(LayoutError, match="at least once"):
        LAYOUT.repeat(0)


def test_layout_is_immutable_and_hashable():
    assert hash(LAYOUT) == hash(PromptLayout.from_dict(LAYOUT.to_dict()))
    with pytest.raises(FrozenInstanceError):
        ROW.length = 3


def test_json_round_trip():
    assert PromptLayout.from_dict(json.loads(json.dumps(LAYOUT.to_dict()))) == LAYOUT


def test_summary_names_every_block():
    assert LAYOUT.summary().splitlines() == [
        "PromptLayout: 3 rows x 20 tokens, 20 vision",
        "  row 0: pad 1, text 7, image0[3:7] 1x2x2 image1[9:13] 1x2x2 image1[13:17] 1x2x2",
        "  row 1: pad 2, text 10, video0[4:12] 2x2x2",
        "  row 2: pad 5, text 15, no vision",
    ]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ((5, 5, "image", (1, 1, 1), 0), "is empty"),
        ((-1, 3, "image", (1, 2, 2), 0), "starts before 0"),
        ((0, 4, "audio", (1, 2, 2), 0), "'image' or 'video'"),
        ((0, 4, "image", (2, 2), 0), "three positive integers"),
        ((0, 4, "image", (1, -2, -2), 0), "three positive integers"),
        ((0, 4, "image", (1, 2, 3), 0), r"grid \(1, 2, 3\) needs 6"),
        ((0, 4, "image", (1, 2, 2), -1), "image index"),
        ((2, 6, "image", (1, 2, 2), 0, (6, 1)), "ascending"),
        ((2, 6, "image", (1, 2, 2), 0, (-1,)), "ascending"),
        ((2, 6, "image", (1, 2, 2), 0, (1, 3)), "inside the block"),
    ],
)
def test_wrong_blocks(fields, message):
    with pytest.raises(LayoutError, match=message):
        VisionBlock(*fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ((4, 5), "pad_left 5"),
        ((20, 4, (FIRST,)), "overlaps"),
        ((20, 0, (FIRST, FIRST)), "overlaps"),
        ((6, 0, (FIRST,)), "after the row"),
        ((20, 0, TILES), "count up from 0"),
        ((7, 0, (FIRST,)), "delimiter 7"),
        ((20, 3, (FIRST,)), "delimiter 2"),
        ((20, 0, (FIRST, VisionBlock(9, 10, "image", (1, 1, 1), 1, (7,)))), "claim the same delimiter"),
        ((20, 0, (FIRST, VisionBlock(9, 10, "image", (1, 1, 1), 1, (4,)))), "inside a vision block"),
    ],
)
def test_wrong_rows(fields, message):
    with pytest.raises(LayoutError, match=message):
        RowLayout(*fields)


def test_rows_of_different_length():
    with pytest.raises(LayoutError, match="same padded length"):
        PromptLayout((RowLayout(3), RowLayout(4)))


@pytest.mark.parametrize(
    "data",
    [
        {},
        {"rows": None},
        {"rows": [{"length": 4}]},
        {"rows": [{"length": "4", "pad_left": 0, "blocks": []}]},
        {"rows": [{"length": 4.0, "pad_left": 0, "blocks": []}]},
        {"rows": [{"length": True, "pad_left": 0, "blocks": []}]},
        {"rows": [[]]},
        {"rows": [{"length": 4, "pad_left": 0, "blocks": [{"start": 0}]}]},
        {"rows": []},
    ],
)
def test_malformed_dicts(data):
    with pytest.raises(LayoutError):
        PromptLayout.from_dict(data)
