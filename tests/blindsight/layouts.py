"""Layouts by hypothesis, and the masks written out as an obviously right loop."""

from hypothesis import strategies as st

from capsight.blindsight import Category, MaskOptions
from capsight.layout import PromptLayout, RowLayout, VisionBlock

CATEGORIES = list(Category)


@st.composite
def rows(draw, most_blocks=4, most_side=4):
    """A row of random images, tiles and videos, some neighbouring, some with delimiters."""
    pad = draw(st.integers(0, 4))
    position, image, blocks = pad, -1, []
    for _ in range(draw(st.integers(0, most_blocks))):
        grid = draw(st.tuples(st.integers(1, 2), st.integers(1, most_side), st.integers(1, most_side)))
        image += 1 if image < 0 else draw(st.sampled_from([0, 1, 1]))
        position += draw(st.integers(0, 3))
        before, after = draw(st.integers(0, 2)), draw(st.integers(0, 1))
        start = position + before
        end = start + grid[0] * grid[1] * grid[2]
        delimiters = (*range(position, start), *range(end, end + after))
        blocks.append(VisionBlock(start, end, "image", grid, image, delimiters))
        position = end + after
    return RowLayout(position + draw(st.integers(1, 5)), pad, tuple(blocks))


@st.composite
def layouts(draw, most_rows=3, **kwargs):
    found = draw(st.lists(rows(**kwargs), min_size=1, max_size=most_rows))
    length = max(row.length for row in found)
    return PromptLayout(tuple(row.extended(length - row.length) for row in found))


def options():
    return st.builds(MaskOptions, st.booleans(), st.integers(0, 3), st.integers(1, 6))


def prompt(*sizes, text=3, between=1, pad=0, tail=7):
    """A row of images of so many tokens, each between two delimiters."""
    position, blocks = pad + text, []
    for image, size in enumerate(sizes):
        start, end = position + 1, position + 1 + size
        blocks.append(VisionBlock(start, end, "image", (1, 1, size), image, (start - 1, end)))
        position = end + 1 + between
    return RowLayout(position + tail, pad, tuple(blocks))


def sees(row, options, category, rule, q, k):
    """Whether the query at q sees the key at k, told the long way."""
    if min(q, k) < row.pad_left:
        return False
    mine, theirs = row.block_at(q), row.block_at(k)
    two_way = rule.bidirectional_images and mine is not None and mine == theirs
    if k > q and not two_way:
        return False
    if rule.sliding_window is not None and q - k >= rule.sliding_window:
        return False
    if mine is None or category is Category.DENSE:
        return True
    owner = theirs or next((b for b in row.blocks if k in b.delimiters), None)
    if owner is None:
        return True
    if owner.image == mine.image and (category is not Category.SINK or abs(q - k) < options.own_window):
        return True
    if category is Category.INTRA_IMAGE:
        return False
    if theirs is None:
        return options.sink_delimiters
    tokens = [p for b in row.image_blocks(owner.image) for p in range(b.start, b.end)]
    return k in tokens[: options.sink_tokens]
