"""Golden layouts: real processors and tiny models of every family, images."""

import numpy as np
import pytest
import torch

from capsight.layout import build_layout, supported_families
from layout.golden import IMAGES, written
from tiny import FAMILIES


@pytest.fixture(params=sorted(FAMILIES))
def vlm(request):
    return FAMILIES[request.param]()


@pytest.fixture
def batch(vlm):
    """One image; two neighbouring images of different sizes; no image."""
    first, second, other = vlm.picture(0), vlm.picture(1), vlm.picture(2, vlm.other_size)
    return vlm.inputs([([first], "hi?"), ([second, other], "what is it"), ([], "text only")])


def test_every_supported_family_is_tested():
    tested = {build().config.model_type for build in FAMILIES.values()}
    assert set(supported_families()) - {"qwen3_vl_moe"} == tested
    assert set(IMAGES) == set(FAMILIES)


def test_golden(vlm, batch):
    assert written(build_layout(batch, vlm.config)) == IMAGES[vlm.name]


def test_blocks_and_delimiters_cover_the_image_tokens(vlm, batch):
    layout = build_layout(batch, vlm.config)
    for row, ids in zip(layout.rows, batch["input_ids"].tolist(), strict=True):
        vision = {p for b in row.blocks for p in range(b.start, b.end)}
        kinds = {vlm.token_id(name) for name in ("image", "break", "end") if name in vlm.special}
        images = {p for p, token in enumerate(ids) if token == vlm.token_id("image")}
        assert vision <= {p for p, token in enumerate(ids) if token in kinds}
        assert images <= vision | set(row.delimiters)
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


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "glm4v", "glm_ocr", "paddleocr_vl"])
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
