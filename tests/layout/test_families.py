"""Golden layouts: real processors and tiny models of every family, images."""

import numpy as np
import pytest
import torch

from capsight.layout import RowLayout, VisionBlock, build_layout, supported_families
from tiny import FAMILIES

IMAGE = "image"


def tile(start, end, image, delimiters, grid=(1, 8, 8)):
    return VisionBlock(start, end, IMAGE, grid, image, delimiters)


def tagged(start, image, *more):
    """An Idefics3 tile: the fake token and a tag of several bytes stand before its 64 tokens."""
    length = 13 if not more else 12
    return tile(start, start + 64, image, (*range(start - length - 1, start), *more))


QWEN = [
    RowLayout(193, 105, (tile(112, 176, 0, (111, 176)),)),
    RowLayout(193, 0, (tile(7, 71, 0, (6, 71)), tile(73, 169, 1, (72, 169), (1, 8, 12)))),
    RowLayout(193, 165),
]

GOLDEN = {
    "qwen2_vl": QWEN,
    "qwen2_5_vl": QWEN,
    "qwen3_vl": QWEN,
    "gemma3": [
        RowLayout(162, 75, (tile(84, 148, 0, (83, 148)),)),
        RowLayout(162, 0, (tile(9, 73, 0, (8, 73)), tile(77, 141, 1, (76, 141)))),
        RowLayout(162, 137),
    ],
    "llava_onevision": [
        RowLayout(159, 1, (tile(7, 71, 0, ()), tile(71, 143, 0, (), (1, 8, 9)))),
        RowLayout(159, 0, (tile(6, 70, 0, (70,)), tile(71, 135, 1, (135,)))),
        RowLayout(159, 131),
    ],
    "internvl": [
        RowLayout(291, 202, (tile(209, 273, 0, (208, 273)),)),
        RowLayout(
            291,
            0,
            (
                tile(7, 71, 0, (6, 71)),
                tile(74, 138, 1, (73,)),
                tile(138, 202, 1, ()),
                tile(202, 266, 1, (266,)),
            ),
        ),
        RowLayout(291, 263),
    ],
    "smolvlm": [
        RowLayout(162, 74, (tile(82, 146, 0, (80, 81, 146)),)),
        RowLayout(162, 0, (tile(8, 72, 0, (6, 7, 72)), tile(75, 139, 1, (73, 74, 139)))),
        RowLayout(162, 135),
    ],
    "idefics3": [
        RowLayout(655, 399, (tagged(419, 0), tagged(497, 0), tagged(575, 0, 639))),
        RowLayout(
            655,
            0,
            (
                *(tagged(20, 0), tagged(98, 0), tagged(176, 0, 240)),
                *(tagged(255, 1), tagged(333, 1), tagged(412, 1), tagged(490, 1), tagged(568, 1, 632)),
            ),
        ),
        RowLayout(655, 628),
    ],
}


@pytest.fixture(params=sorted(FAMILIES))
def vlm(request):
    return FAMILIES[request.param]()


@pytest.fixture
def batch(vlm):
    """One image; two neighbouring images of different sizes; no image."""
    first, second, other = vlm.picture(0), vlm.picture(1), vlm.picture(2, vlm.other_size)
    return vlm.inputs([([first], "hi?"), ([second, other], "what is it"), ([], "text only")])


def test_every_supported_family_is_tested():
    assert {name for name in supported_families() if name != "qwen3_vl_moe"} == set(GOLDEN) == set(FAMILIES)


def test_golden(vlm, batch):
    assert list(build_layout(batch, vlm.config).rows) == GOLDEN[vlm.name]


def test_blocks_and_delimiters_cover_the_image_tokens(vlm, batch):
    layout = build_layout(batch, vlm.config)
    for row, ids in zip(layout.rows, batch["input_ids"].tolist(), strict=True):
        vision = {p for b in row.blocks for p in range(b.start, b.end)}
        written = {p for p, token in enumerate(ids) if token == vlm.token_id("image")}
        assert vision <= written <= vision | set(row.delimiters)
        assert all(token == vlm.token_id("pad") for token in ids[: row.pad_left])


def test_the_model_takes_as_many_tokens(vlm, batch):
    """The counts are right if the model finds a feature for every image token and generates."""
    with torch.no_grad():
        out = vlm.model.generate(**batch, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert out.shape == (3, batch["input_ids"].shape[1] + 4)


def test_images_change_the_answer(vlm, batch):
    other = dict(batch) | {"pixel_values": batch["pixel_values"].flip(-1)}
    with torch.no_grad():
        moved = (vlm.model(**batch).logits - vlm.model(**other).logits)[:, -1].abs().amax(-1)
    assert (moved[:2] > 1e-3).all()
    assert moved[2] == 0


def test_a_row_alone_reads_as_in_the_batch(vlm, batch):
    layout = build_layout(batch, vlm.config)
    second = vlm.inputs([([vlm.picture(1), vlm.picture(2, vlm.other_size)], "what is it")])
    assert build_layout(second, vlm.config) == layout.select([1])


def test_a_text_only_batch(vlm):
    layout = build_layout(vlm.inputs([([], "a"), ([], "a longer text")]), vlm.config)
    assert layout.vision_tokens == 0
    assert layout.last_vision_end == 0
    assert layout.rows[0].pad_left == len("a longer text") - 1


def test_text_between_images_and_a_second_turn(vlm):
    images = [vlm.picture(0), vlm.picture(1)]
    turns = vlm.prompt(images[:1], "first") + "answer\n" + vlm.prompt(images[1:], "second")
    layout = build_layout(vlm.process([turns], [images]), vlm.config)
    row = layout.rows[0]
    assert row.num_images == 2
    split = layout.last_vision_end
    assert layout.prefix(split).vision_tokens == layout.vision_tokens
    assert row.length - split > len("second")


def test_four_neighbouring_images(vlm):
    images = [vlm.picture(i, vlm.other_size if i == 2 else None) for i in range(4)]
    row = build_layout(vlm.inputs([(images, "compare")]), vlm.config).rows[0]
    assert row.num_images == 4
    assert max(block.num_tokens for block in row.blocks) >= 64


def test_lists_and_arrays_read_as_tensors(vlm, batch):
    expected = build_layout(batch, vlm.config)
    arrays = {key: value.numpy() for key, value in batch.items()}
    lists = {key: value.tolist() if key != "pixel_values" else value for key, value in batch.items()}
    assert build_layout(arrays, vlm.config) == expected
    assert build_layout(lists, vlm.config) == expected


def test_pixels_are_not_needed(vlm, batch):
    ids_only = {key: value for key, value in batch.items() if not key.startswith("pixel")}
    assert build_layout(ids_only, vlm.config) == build_layout(batch, vlm.config)


def test_without_attention_mask_nothing_is_padding(vlm):
    inputs = vlm.inputs([([vlm.picture(0)], "hi")])
    expected = build_layout(inputs, vlm.config)
    del inputs["attention_mask"]
    assert build_layout(inputs, vlm.config) == expected


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_grids_are_the_grids_of_m_rope(name):
    vlm = FAMILIES[name]()
    images = [vlm.picture(0), vlm.picture(1, vlm.other_size)]
    inputs = vlm.inputs([(images, "what"), ([], "text")])
    positions, _ = vlm.model.model.get_rope_index(
        **{key: value for key, value in inputs.items() if key != "pixel_values"}
    )
    for block in build_layout(inputs, vlm.config).rows[0].blocks:
        of_block = positions[:, 0, block.start : block.end].numpy()
        expected = np.indices(block.grid).reshape(3, -1)
        assert (of_block - of_block[:, :1] == expected).all()


def test_llava_detail_grid_follows_the_picture():
    """The tiled picture loses its padding; where it is too large it is scaled down."""
    vlm = FAMILIES["llava_onevision"]()
    for size in [(32, 32), (64, 24), (24, 64), (60, 60), (33, 64)]:
        inputs = vlm.inputs([([vlm.picture(0, size)], "what")])
        base, detail = build_layout(inputs, vlm.config).rows[0].blocks
        features = vlm.model.get_image_features(
            **{key: inputs[key] for key in ("pixel_values", "image_sizes", "batch_num_images")}
        ).pooler_output
        assert base.num_tokens + detail.num_tokens == features[0].shape[0]
