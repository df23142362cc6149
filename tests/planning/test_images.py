"""Planned prompts against what the families' processors write."""

from __future__ import annotations

import pytest

from capsight.errors import OptionError
from capsight.kvcapsule import CapsulePlan
from capsight.layout import build_layout
from capsight.planning import grids_of_size, grids_of_tokens, mix_layout
from capsight.planning.images import squarest
from tiny import FAMILIES, TinyVLM


@pytest.fixture(params=sorted(FAMILIES))
def vlm(request: pytest.FixtureRequest) -> TinyVLM:
    return FAMILIES[request.param]()


@pytest.mark.parametrize("size", ["size", "other_size"])
@pytest.mark.parametrize("count", [1, 2])
def test_tokens_and_delimiters(vlm, size, count):
    if vlm.name in ("lfm2_vl", "minicpmv4_6", "minicpmv4_7") and size == "other_size":
        pytest.skip("how large its tiles are is in its processor; planned are images of one tile")
    images = [vlm.picture(seed, getattr(vlm, size)) for seed in range(count)]
    row = build_layout(vlm.inputs([(images, "hi")]), vlm.config).rows[0]
    tokens = [sum(b.num_tokens for b in row.image_blocks(i)) for i in range(count)]
    grids = [grids_of_tokens(vlm.config, n) for n in tokens]
    planned = mix_layout(vlm.config, grids, 5)
    ours = planned.rows[0]
    assert [b.num_tokens for b in ours.blocks] == [b.num_tokens for b in row.blocks]
    assert [b.image for b in ours.blocks] == [b.image for b in row.blocks]
    if vlm.name != "idefics3":  # its tags are spelled in several tokens, how many the tokenizer decides
        assert len(ours.delimiters) == len(row.delimiters)
    assert ours.text_tokens == 5 + len(ours.delimiters)
    real = build_layout(vlm.inputs([(images, "hi")]), vlm.config)
    assert len(CapsulePlan.from_layout(planned).runs) == len(CapsulePlan.from_layout(real).runs)


PIXELS = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "gemma3", "llava_onevision", "llava", "llava_next"]


@pytest.mark.parametrize(
    "name",
    [
        *PIXELS,
        "glm4v",
        "glm_ocr",
        "mistral3",
        "pixtral",
        "paddleocr_vl",
        "exaone4_5",
        "lighton_ocr",
        "deepseek_vl",
    ],
)
def test_pixels(name):
    vlm = FAMILIES[name]()
    images = [vlm.picture(seed, vlm.other_size) for seed in range(2)]
    blocks = build_layout(vlm.inputs([(images, "hi")]), vlm.config).rows[0].blocks
    planned = [grid for _ in images for grid in grids_of_size(vlm.config, *vlm.other_size)]
    assert planned == [block.grid[1:] for block in blocks]


@pytest.mark.parametrize(
    ("name", "make", "words"),
    [
        ("internvl", lambda c: grids_of_size(c, 100, 100), "--image-tokens"),
        ("llava_onevision", lambda c: grids_of_size(c, 100, 100, alone=True), "--image-tokens"),
        ("qwen2_vl", lambda c: grids_of_size(c, 0, 100), "no tokens"),
        ("gemma3", lambda c: grids_of_tokens(c, 65), "multiple of 64"),
        ("qwen2_vl", lambda c: grids_of_tokens(c, 0), "at least one"),
        ("qwen2_vl", lambda c: mix_layout(c, [], 0), "text or images"),
    ],
)
def test_errors(name, make, words):
    with pytest.raises(OptionError, match=words):
        make(FAMILIES[name]().config)


def test_squarest():
    assert [squarest(n) for n in (1, 7, 64, 128, 1024)] == [(1, 1), (1, 7), (8, 8), (8, 16), (32, 32)]
