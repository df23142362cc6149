"""Golden layouts: videos, through the real processors with a stand-in video processor."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from capsight.layout import RowLayout, VisionBlock, build_layout
from tiny import FAMILIES, clip


def film(start, end, image, delimiters, grid):
    return VisionBlock(start, end, "video", grid, image, delimiters)


TWO_SECONDS = {"frame_seconds": 2.0}  # two frames a temporal patch, one frame a second
ONE_PAIR_A_CLIP = [
    RowLayout(89, 35, (film(42, 74, 0, (41, 74), (2, 4, 4)),)),
    RowLayout(89, 0, (film(7, 39, 0, (6, 39), (2, 4, 4)), film(41, 73, 1, (40, 73), (2, 4, 4)))),
]
FRAME = (1, 4, 4)

GOLDEN = {
    "qwen2_vl": ONE_PAIR_A_CLIP,
    "qwen2_5_vl": [
        replace(row, blocks=tuple(replace(block, **TWO_SECONDS) for block in row.blocks))
        for row in ONE_PAIR_A_CLIP
    ],
    # One pair a frame after `<0.5 seconds>`, and the chat template's pair around all frames.
    "qwen3_vl": [
        RowLayout(
            149, 65, (film(86, 102, 0, (71, 85, 102), FRAME), film(117, 133, 0, (116, 133, 134), FRAME))
        ),
        RowLayout(
            149,
            0,
            (
                film(21, 37, 0, (6, 20, 37), FRAME),
                film(52, 68, 0, (51, 68, 69), FRAME),
                film(85, 101, 1, (70, 84, 101), FRAME),
                film(116, 132, 1, (115, 132, 133), FRAME),
            ),
        ),
    ],
    "llava_onevision": [
        RowLayout(151, 66, (film(72, 136, 0, (136,), (4, 4, 4)),)),
        RowLayout(151, 0, (film(6, 70, 0, (70,), (4, 4, 4)), film(71, 135, 1, (135,), (4, 4, 4)))),
    ],
}


def clips(vlm):
    return vlm.video_inputs([([clip()], "a"), ([clip(1), clip(2)], "bb")])


@pytest.mark.parametrize("name", sorted(GOLDEN))
def test_golden(name):
    vlm = FAMILIES[name]()
    layout = build_layout(clips(vlm), vlm.config)
    assert list(layout.rows) == GOLDEN[name]
    assert (layout.num_images, layout.num_videos) == (0, 3)


@pytest.mark.parametrize("name", ["internvl", "smolvlm"])
def test_families_that_write_frames_as_images(name):
    vlm = FAMILIES[name]()
    layout = build_layout(clips(vlm), vlm.config)
    assert [row.num_images for row in layout.rows] == [4, 8]
    assert {block.grid for row in layout.rows for block in row.blocks} == {(1, 8, 8)}
    assert all(row.image_blocks(i) for row in layout.rows for i in range(row.num_images))


@pytest.mark.parametrize("name", [*sorted(GOLDEN), "internvl", "smolvlm"])
def test_the_model_takes_as_many_tokens(name):
    vlm = FAMILIES[name]()
    inputs = clips(vlm)
    with torch.no_grad():
        out = vlm.model.generate(**inputs, max_new_tokens=2, min_new_tokens=2, do_sample=False)
    assert out.shape[1] == inputs["input_ids"].shape[1] + 2


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_an_image_and_a_video_in_one_prompt(name):
    vlm = FAMILIES[name]()
    text = [vlm.placeholder + vlm.video_placeholder + vlm.placeholder + "what"]
    images = [[vlm.picture(0), vlm.picture(1, vlm.other_size)]]
    inputs = vlm.process(text, images, videos=[clip()])
    layout = build_layout(inputs, vlm.config)
    kinds = [(block.kind, block.image) for block in layout.rows[0].blocks]
    frames = [("video", 1)] * (2 if name == "qwen3_vl" else 1)
    assert kinds == [("image", 0), *frames, ("image", 2)]
    assert (layout.num_images, layout.num_videos) == (2, 1)
    positions, _ = vlm.model.model.get_rope_index(
        **{key: value for key, value in inputs.items() if not key.startswith("pixel")}
    )
    for block in layout.rows[0].blocks:
        of_block = positions[1:, 0, block.start : block.end].numpy()
        assert (of_block - of_block[:, :1] == np.indices(block.grid).reshape(3, -1)[1:]).all()


def test_qwen3_frames_without_the_outer_pair():
    """Earlier processors replaced the template's pair: then each frame has its own two only."""
    vlm = FAMILIES["qwen3_vl"]()
    inputs = vlm.processor(
        text=["a " + vlm.special["video"] + " what"], videos=[clip()], padding=True, return_tensors="pt"
    )
    blocks = build_layout(inputs, vlm.config).rows[0].blocks
    assert [block.delimiters for block in blocks] == [(b.start - 1, b.end) for b in blocks]
