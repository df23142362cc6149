"""What is refused, and what the messages say: padding, truncation, delimiters, counts, models."""

import pytest
import torch

from capsight.errors import LayoutError
from capsight.layout import build_layout
from layout.golden import IMAGES
from tiny import FAMILIES

ALL = sorted(FAMILIES)
DELIMITED = [name for name in ALL if name != "llava_onevision" and " at " in IMAGES[name]]
GRIDS = [
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
    "qwen3_5",
    "qwen3_5_moe",
    "glm4v",
    "glm4v_moe",
    "glm46v",
    "glm_ocr",
    "paddleocr_vl",
]
PER_TOKEN = ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids")


def two_images(vlm):
    inputs = vlm.inputs([([vlm.picture(0), vlm.picture(1)], "what is it")])
    return inputs, build_layout(inputs, vlm.config).rows[0]


def keep(inputs, positions):
    """The inputs with only these token positions; pictures and grids as they were."""
    index = torch.tensor(list(positions))
    return {key: value[:, index] if key in PER_TOKEN else value for key, value in inputs.items()}


def without(inputs, *dropped):
    return keep(inputs, [p for p in range(inputs["input_ids"].shape[1]) if p not in dropped])


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("tokens_left", [-1, 0, 5])
def test_truncated_on_the_right(name, tokens_left):
    """The prompt ends before, inside or directly after the last block."""
    vlm = FAMILIES[name]()
    inputs, row = two_images(vlm)
    last = row.blocks[-1]
    end = {-1: last.start - 1, 0: last.end, 5: last.start + 5}[tokens_left]
    if not last.delimiters and tokens_left == 0:  # nothing tells this prompt from a whole one
        assert build_layout(keep(inputs, range(end)), vlm.config).rows[0].blocks == row.blocks
        return
    with pytest.raises(LayoutError):
        build_layout(keep(inputs, range(end)), vlm.config)


@pytest.mark.parametrize("name", ALL)
def test_truncated_on_the_left(name):
    vlm = FAMILIES[name]()
    inputs, row = two_images(vlm)
    with pytest.raises(LayoutError):
        build_layout(keep(inputs, range(row.blocks[0].start + 3, row.length)), vlm.config)


@pytest.mark.parametrize("name", DELIMITED)
@pytest.mark.parametrize("which", [0, 1, -2, -1])
def test_a_delimiter_is_missing(name, which):
    vlm = FAMILIES[name]()
    inputs, row = two_images(vlm)
    first, last = row.image_blocks(0), row.image_blocks(1)
    ends = [first[0].delimiters[0], first[-1].delimiters[-1], last[0].delimiters[0], last[-1].delimiters[-1]]
    with pytest.raises(LayoutError):
        build_layout(without(inputs, ends[which]), vlm.config)


@pytest.mark.parametrize("name", DELIMITED)
def test_no_delimiters_at_all(name):
    vlm = FAMILIES[name]()
    inputs, row = two_images(vlm)
    with pytest.raises(LayoutError):
        build_layout(without(inputs, *row.delimiters), vlm.config)


@pytest.mark.parametrize("name", ALL)
def test_an_image_has_no_tokens(name):
    vlm = FAMILIES[name]()
    inputs, row = two_images(vlm)
    gone = [p for b in row.image_blocks(1) for p in (*range(b.start, b.end), *b.delimiters)]
    with pytest.raises(LayoutError, match="truncated or a placeholder is missing"):
        build_layout(without(inputs, *gone), vlm.config)


@pytest.mark.parametrize("name", GRIDS)
def test_grids_do_not_fit(name):
    vlm = FAMILIES[name]()
    inputs, _ = two_images(vlm)
    grids = inputs["image_grid_thw"]
    with pytest.raises(LayoutError, match="no entry left in image_grid_thw"):
        build_layout(dict(inputs) | {"image_grid_thw": grids[:1]}, vlm.config)
    with pytest.raises(LayoutError, match=r"64 vision tokens at \d+, but image_grid_thw"):
        build_layout(dict(inputs) | {"image_grid_thw": grids + torch.tensor([0, 2, 0])}, vlm.config)
    with pytest.raises(LayoutError, match="3 entries"):
        build_layout(dict(inputs) | {"image_grid_thw": grids[[0, 1, 1]]}, vlm.config)
    del inputs["image_grid_thw"]
    with pytest.raises(LayoutError, match="no entry left"):
        build_layout(inputs, vlm.config)


def test_neighbours_without_delimiters_are_named():
    vlm = FAMILIES["gemma3"]()
    inputs, row = two_images(vlm)
    between = range(row.blocks[0].end, row.blocks[1].start)
    with pytest.raises(LayoutError, match="neighbouring images stand there without the delimiters"):
        build_layout(without(inputs, *between), vlm.config)


def test_llava_needs_its_counts():
    vlm = FAMILIES["llava_onevision"]()
    inputs, _ = two_images(vlm)
    del inputs["batch_num_images"]
    with pytest.raises(LayoutError, match="batch_num_images"):
        build_layout(inputs, vlm.config)


def test_internvl_delimiters_from_the_config():
    vlm = FAMILIES["internvl"]()
    inputs, row = two_images(vlm)
    config = type(vlm.config).from_dict(vlm.config.to_dict())
    config.start_image_token_id, config.end_image_token_id = vlm.token_id("start"), vlm.token_id("end")
    assert build_layout(inputs, config).rows[0] == row
    config.start_image_token_id += 1
    with pytest.raises(LayoutError, match="not preceded by the start-of-image token"):
        build_layout(inputs, config)


@pytest.mark.parametrize("name", ALL)
def test_padding_on_the_right(name):
    vlm = FAMILIES[name]()
    inputs = vlm.inputs([([vlm.picture(0)], "hi"), ([vlm.picture(0)], "a longer one")], padding_side="right")
    with pytest.raises(LayoutError, match=r"row 0 is padded on the right; .*padding_side = 'left'"):
        build_layout(inputs, vlm.config)


def test_masks_that_are_no_padding():
    vlm = FAMILIES["qwen2_5_vl"]()
    inputs, _ = two_images(vlm)
    mask = inputs["attention_mask"]
    holed = mask.clone()
    holed[0, 9] = 0
    for changed, message in [
        (holed, r"holes in its attention_mask \(position 9\)"),
        (mask * 0, "padding only"),
        (mask[:, 1:], "same shape"),
        (mask[:, None, None], "two dimensions"),
        (mask[0], "shape"),
    ]:
        with pytest.raises(LayoutError, match=message):
            build_layout(dict(inputs) | {"attention_mask": changed}, vlm.config)


def test_input_ids_are_needed():
    with pytest.raises(LayoutError, match="needs 'input_ids'"):
        build_layout({"inputs_embeds": torch.zeros(1, 2, 3)}, FAMILIES["gemma3"]().config)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "gemma3"])
def test_token_types_disagree(name):
    vlm = FAMILIES[name]()
    inputs, row = two_images(vlm)
    key = "token_type_ids" if name == "gemma3" else "mm_token_type_ids"
    inputs[key][0, row.blocks[0].start] = 0
    with pytest.raises(LayoutError, match=f"{key} says text inside the vision block"):
        build_layout(inputs, vlm.config)
