"""The reference mask against a plain loop, and the span arithmetic against the reference mask."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blindsight.layouts import CATEGORIES, layouts, options, prompt, rows, sees
from capsight.blindsight import BaseRule, Category, MaskOptions, reference_mask
from capsight.blindsight.spans import Chunk, extents, intervals
from capsight.errors import LayoutError, OptionError
from capsight.layout import PromptLayout, RowLayout, VisionBlock

SETTINGS = settings(max_examples=40)
RULES = st.builds(BaseRule, st.none() | st.integers(1, 12), st.booleans())


@SETTINGS
@given(layouts(most_rows=2, most_side=3), options(), st.sampled_from(CATEGORIES), RULES)
def test_reference_mask_is_what_the_loop_says(layout, chosen, category, rule):
    mask = reference_mask(layout, chosen, category, rule)
    places = range(layout.length)
    for row, found in zip(layout.rows, mask.tolist(), strict=True):
        assert found == [[sees(row, chosen, category, rule, q, k) for k in places] for q in places]


@SETTINGS
@given(rows(), options(), st.sampled_from(CATEGORIES), RULES, st.data())
def test_intervals_write_out_to_the_reference_mask(row, chosen, category, rule, data):
    first_query = data.draw(st.integers(0, row.length - 1))
    end = data.draw(st.integers(first_query + 1, row.length))
    first_key = data.draw(st.integers(0, first_query))
    found = intervals(row, category, chosen, rule, Chunk(first_key, first_query, end))
    position = torch.arange(end)
    in_front = torch.isin(position, found.front)
    lo, split, last = (x[:, None] for x in (found.lo, found.split, found.last))
    seen = (in_front & (position >= lo) & (position < split)) | (
        (position >= torch.maximum(lo, split)) & (position <= last)
    )
    expected = reference_mask(PromptLayout((row,)), chosen, category, rule)[0, first_query:end, :end]
    expected[:, :first_key] = False
    assert torch.equal(seen, expected)
    assert torch.equal(found.pairs(), expected.sum(-1))


@SETTINGS
@given(layouts(), options(), RULES)
def test_categories_are_ordered_and_text_rows_are_dense(layout, chosen, rule):
    dense, sink, intra, both = (reference_mask(layout, chosen, category, rule) for category in CATEGORIES)
    assert torch.equal(both, sink | intra) or not (both & ~(sink | intra)).any()
    assert not (sink & ~both).any()
    assert not (intra & ~both).any()
    assert not (both & ~dense).any()
    for index, row in enumerate(layout.rows):
        for start, end in row.text_spans:
            assert torch.equal(sink[index, start:end], dense[index, start:end])


def test_a_prompt_by_hand():
    layout = PromptLayout((prompt(3, 3, text=1, between=0, tail=1),))  # t [ iii ] [ iii ] t
    mask = reference_mask(layout, MaskOptions(sink_tokens=1, own_window=1), Category.INTRA_IMAGE_SINK)[0]
    lines = ["".join(".x"[seen] for seen in row) for row in mask.tolist()]
    assert lines[7:11] == ["xxx..xxx....", "xxx..xxxx...", "xxx..xxxxx..", "xxxxxxxxxxx."]
    sink = reference_mask(layout, MaskOptions(sink_tokens=1, own_window=1), Category.SINK)[0]
    assert "".join(".x"[seen] for seen in sink[9].tolist()) == "xxx..xxx.x.."


def test_tiles_of_one_image_see_each_other():
    tiles = tuple(
        VisionBlock(start, start + 2, "image", (1, 1, 2), image, ())
        for start, image in ((1, 0), (3, 0), (6, 1))
    )
    row = RowLayout(9, 0, tiles)
    mask = reference_mask(PromptLayout((row,)), MaskOptions(), Category.INTRA_IMAGE)[0]
    assert mask[4].tolist() == [True] * 5 + [False] * 4
    assert mask[7].tolist() == [True, False, False, False, False, True, True, True, False]


def test_interleaved_images_are_refused():
    blocks = (VisionBlock(1, 3, "image", (1, 1, 2), 0, (6,)), VisionBlock(4, 6, "image", (1, 1, 2), 1, (3,)))
    with pytest.raises(LayoutError, match="interleave"):
        extents(RowLayout(8, 0, blocks))


@pytest.mark.parametrize("wrong", [{"sink_tokens": -1}, {"own_window": 0}])
def test_options_out_of_range(wrong):
    with pytest.raises(OptionError):
        MaskOptions(**wrong)


def test_rule_out_of_range():
    with pytest.raises(OptionError):
        BaseRule(sliding_window=0)
