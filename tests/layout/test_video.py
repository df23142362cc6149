"""Golden layouts: videos, through the real processors with a stand-in video processor."""

import numpy as np
import pytest
import torch
import transformers
from packaging.version import Version

from capsight.errors import LayoutError
from capsight.layout import build_layout
from capsight.layout.pixels import select_images
from layout.golden import written
from layout.golden_video import VIDEOS
from tiny import COMPLETE, FAMILIES, clip

FRAMES_AS_IMAGES = ["internvl", "smolvlm"]
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
]


def clips(vlm):
    return vlm.video_inputs([([clip()], "a"), ([clip(1), clip(2)], "bb")])


@pytest.mark.parametrize("name", sorted(VIDEOS))
def test_golden(name):
    vlm = FAMILIES[name]()
    if name == "muse_glimmer" and Version(transformers.__version__) < COMPLETE:
        pytest.skip("its processor writes other times between frames")
    layout = build_layout(clips(vlm), vlm.config)
    assert written(layout) == VIDEOS[name]
    assert (layout.num_images, layout.num_videos) == ((12, 0) if name in FRAMES_AS_IMAGES else (0, 3))


@pytest.mark.parametrize("name", FRAMES_AS_IMAGES)
def test_families_that_write_frames_as_images(name):
    vlm = FAMILIES[name]()
    layout = build_layout(clips(vlm), vlm.config)
    assert [row.num_images for row in layout.rows] == [4, 8]
    assert {block.grid for row in layout.rows for block in row.blocks} == {(1, 8, 8)}
    assert all(row.image_blocks(i) for row in layout.rows for i in range(row.num_images))


@pytest.mark.parametrize("name", sorted(VIDEOS))
def test_the_model_takes_as_many_tokens(name):
    vlm = FAMILIES[name]()
    inputs = clips(vlm)
    with torch.no_grad():
        out = vlm.model.generate(**inputs, max_new_tokens=2, min_new_tokens=2, do_sample=False)
    assert out.shape[1] == inputs["input_ids"].shape[1] + 2


@pytest.mark.parametrize("name", ["gemma4", "minicpmv4_6", "muse_glimmer", "qwen3_vl"])
def test_pixels_are_told_apart_by_row(name):
    vlm = FAMILIES[name]()
    both, alone = clips(vlm), vlm.video_inputs([([clip()], "a")])
    layout = build_layout(both, vlm.config)
    found = select_images(both, layout, {(0, block.image) for block in layout.rows[0].blocks})
    assert "pixel_values_videos" in found
    for key, value in found.items():
        assert torch.equal(value, alone[key]), key


def test_only_pixels_that_lie_apart_are_copied():
    qwen = FAMILIES["qwen2_5_vl"]()
    inputs = qwen.inputs([([qwen.picture(seed) for seed in (1, 2, 3)], "a"), ([qwen.picture(4)], "bb")])
    layout, pixels = build_layout(inputs, qwen.config), inputs["pixel_values"]
    sizes = inputs["image_grid_thw"].prod(1).tolist()
    parts = dict(zip([(0, 0), (0, 1), (0, 2), (1, 0)], pixels.split(sizes), strict=True))
    for wanted in ([(0, 1)], [(0, 2), (1, 0)], [(0, 0), (0, 2)], [(0, 0), (1, 0)], [*parts], []):
        found = select_images(inputs, layout, set(wanted)).get("pixel_values", pixels[:0])
        assert torch.equal(found, torch.cat([pixels[:0], *(parts[key] for key in wanted)]))
        together = wanted != [(0, 0), (0, 2)] and wanted != [(0, 0), (1, 0)]
        assert (found.untyped_storage().data_ptr() == pixels.untyped_storage().data_ptr()) == together
    text = build_layout({"input_ids": torch.full((1, 3), 5)}, qwen.config)
    assert select_images({"pixel_values": pixels[:0], "image_grid_thw": []}, text, set()) == {}


def test_frames_that_are_not_there():
    vlm = FAMILIES["gemma4"]()
    inputs = dict(clips(vlm)) | {"num_frames_per_video": torch.tensor([4, 4, 5])}
    with pytest.raises(LayoutError, match="num_frames_per_video calls for more frames"):
        build_layout(inputs, vlm.config)


@pytest.mark.parametrize("name", GRIDS)
def test_an_image_and_a_video_in_one_prompt(name):
    vlm = FAMILIES[name]()
    text = [vlm.placeholder + vlm.video_placeholder + vlm.placeholder + "what"]
    images = [[vlm.picture(0), vlm.picture(1, vlm.other_size)]]
    inputs = vlm.process(text, images, videos=[clip()])
    layout = build_layout(inputs, vlm.config)
    kinds = [(block.kind, block.image) for block in layout.rows[0].blocks]
    frames = [("video", 1)] * (1 if name in ("qwen2_vl", "qwen2_5_vl") else 2)
    assert kinds == [("image", 0), *frames, ("image", 2)]
    assert (layout.num_images, layout.num_videos) == (2, 1)
    positions, _ = vlm.model.model.get_rope_index(
        **{key: value for key, value in inputs.items() if not key.startswith("pixel")}
    )
    for block in layout.rows[0].blocks:
        of_block = positions[1:, 0, block.start : block.end].numpy()
        assert (of_block - of_block[:, :1] == np.indices(block.grid).reshape(3, -1)[1:]).all()


@pytest.mark.parametrize("which", [0, -1])
def test_glm_videos_need_their_outer_pair(which):
    """It is all that tells frames from images."""
    vlm = FAMILIES["glm4v"]()
    inputs = vlm.video_inputs([([clip()], "a")])
    row = build_layout(inputs, vlm.config).rows[0]
    dropped = row.delimiters[which]
    kept = [p for p in range(row.length) if p != dropped]
    cut = {key: value[:, kept] if value.shape[-1] == row.length else value for key, value in inputs.items()}
    with pytest.raises(LayoutError, match=r"lacks its start or end token|no entry left in image_grid_thw"):
        build_layout(cut, vlm.config)


def test_qwen3_frames_without_the_outer_pair():
    """Earlier processors replaced the template's pair: then each frame has its own two only."""
    vlm = FAMILIES["qwen3_vl"]()
    inputs = vlm.processor(
        text=["a " + vlm.special["video"] + " what"], videos=[clip()], padding=True, return_tensors="pt"
    )
    blocks = build_layout(inputs, vlm.config).rows[0].blocks
    assert [block.delimiters for block in blocks] == [(b.start - 1, b.end) for b in blocks]
