"""PromptLayout by property: what must hold for every layout there can be."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capsight.errors import LayoutError
from capsight.layout import PromptLayout, RowLayout, VisionBlock

SETTINGS = settings(max_examples=60)


@st.composite
def row_layouts(draw):
    """A row of random images, tiles and videos, some neighbouring, some with delimiters."""
    pad = draw(st.integers(0, 4))
    position, image, blocks = pad, -1, []
    for _ in range(draw(st.integers(0, 4))):
        grid = draw(st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 3)))
        image += 1 if image < 0 else draw(st.integers(0, 1))
        position += draw(st.integers(0, 2))
        before, after = draw(st.integers(0, 2)), draw(st.integers(0, 1))
        start = position + before
        end = start + grid[0] * grid[1] * grid[2]
        delimiters = (*range(position, start), *range(end, end + after))
        blocks.append(
            VisionBlock(start, end, draw(st.sampled_from(["image", "video"])), grid, image, delimiters)
        )
        position = end + after
    return RowLayout(position + draw(st.integers(0, 5)), pad, tuple(blocks))


@st.composite
def layouts(draw):
    rows = draw(st.lists(row_layouts(), min_size=1, max_size=3))
    length = max(row.length for row in rows)
    return PromptLayout(tuple(row.extended(length - row.length) for row in rows))


@SETTINGS
@given(layouts())
def test_round_trip_through_json(layout):
    assert PromptLayout.from_dict(json.loads(json.dumps(layout.to_dict()))) == layout


@SETTINGS
@given(row_layouts())
def test_padding_text_and_vision_partition_a_row(row):
    covered = [*range(row.pad_left)]
    for start, end in sorted([*row.text_spans, *((b.start, b.end) for b in row.blocks)]):
        assert start < end
        covered += range(start, end)
    assert covered == list(range(row.length))
    assert row.pad_left + row.text_tokens + row.vision_tokens == row.length


@SETTINGS
@given(row_layouts())
def test_delimiters_are_text(row):
    text = {position for span in row.text_spans for position in range(*span)}
    assert set(row.delimiters) <= text


@SETTINGS
@given(row_layouts())
def test_block_at_agrees_with_the_spans(row):
    for position in range(row.length):
        found = row.block_at(position)
        assert (found is not None) == any(b.start <= position < b.end for b in row.blocks)


@SETTINGS
@given(layouts(), st.integers(0, 5), st.integers(0, 5))
def test_extended_adds_up_and_prefix_undoes_it(layout, n, m):
    assert layout.extended(n).extended(m) == layout.extended(n + m)
    assert layout.extended(n).prefix(layout.length) == layout
    assert layout.extended(n).vision_tokens == layout.vision_tokens


@SETTINGS
@given(layouts(), st.data())
def test_prefix_keeps_what_lies_before_it_or_refuses(layout, data):
    n = data.draw(st.integers(0, layout.length))
    straddled = any(b.start < n < b.end for row in layout.rows for b in row.blocks)
    if straddled:
        with pytest.raises(LayoutError):
            layout.prefix(n)
        return
    cut = layout.prefix(n)
    assert cut.length == n
    for before, after in zip(layout.rows, cut.rows, strict=True):
        assert [b.end for b in after.blocks] == [b.end for b in before.blocks if b.end <= n]
        assert set(after.delimiters) <= set(before.delimiters)


@SETTINGS
@given(layouts())
def test_last_vision_end_is_the_smallest_split(layout):
    n = layout.last_vision_end
    again = layout.prefix(n).extended(layout.length - n)
    assert [row.blocks for row in again.rows] == [row.blocks for row in layout.rows]
    if n:
        reaches = [b.end for row in layout.rows for b in row.blocks]
        reaches += [d + 1 for row in layout.rows for d in row.delimiters]
        assert n == max(reaches)


@SETTINGS
@given(layouts(), st.data())
def test_select_composes_and_repeat_is_a_select(layout, data):
    indices = st.integers(0, layout.batch_size - 1)
    first = data.draw(st.lists(indices, min_size=1, max_size=4))
    second = data.draw(st.lists(st.integers(0, len(first) - 1), min_size=1, max_size=4))
    assert layout.select(first).select(second) == layout.select([first[i] for i in second])
    n = data.draw(st.integers(1, 3))
    assert layout.repeat(n) == layout.select([row for row in range(layout.batch_size) for _ in range(n)])
