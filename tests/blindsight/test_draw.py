"""The pictures exist, are PNGs, and show what they should."""

import os

import pytest
from PIL import Image

from capsight.blindsight import Category, HeadMap, draw_attention, draw_head_map
from capsight.blindsight.draw import COLOURS
from capsight.errors import CapsuleFileError, OptionError
from tiny import FAMILIES


def colours(path):
    picture = Image.open(path).convert("RGB")
    assert picture.format is None or picture.format == "PNG"
    return {colour for _, colour in picture.getcolors(1 << 24)}


def rgb(category):
    return tuple(int(COLOURS[category][i : i + 2], 16) for i in (1, 3, 5))


def test_a_head_map(tmp_path):
    counts = dict.fromkeys(Category, 6)
    path = draw_head_map(HeadMap.random(4, 6, counts, seed=0), tmp_path / "map.png")
    assert {rgb(category) for category in Category} <= colours(path)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "gemma3"])
def test_attention_beside_masks(tmp_path, family):
    vlm = FAMILIES[family]()
    inputs = vlm.inputs([([vlm.picture(i) for i in range(3)], "what is it")])
    text = vlm.config.get_text_config()
    head_map = HeadMap.uniform(Category.INTRA_IMAGE, text.num_hidden_layers, text.num_attention_heads)
    path = draw_attention(vlm.model, inputs, [(0, 1), (2, 3)], head_map, tmp_path / "attention.png")
    picture = Image.open(path)
    assert picture.size[1] >= picture.size[0]
    assert picture.info["Description"] == "layer 0, head 1 (intra_image); layer 2, head 3 (intra_image)"
    assert rgb(Category.INTRA_IMAGE) in colours(path)


def test_what_cannot_be_drawn(tmp_path):
    vlm = FAMILIES["qwen2_5_vl"]()
    one = ([vlm.picture(0)], "hi")
    head_map = HeadMap.all_dense(3, 4)
    with pytest.raises(OptionError, match="one prompt"):
        draw_attention(vlm.model, vlm.inputs([one, one]), [(0, 0)], head_map, tmp_path / "a.png")
    with pytest.raises(OptionError, match="no heads"):
        draw_attention(vlm.model, vlm.inputs([one]), [(3, 0)], head_map, tmp_path / "a.png")
    with pytest.raises(CapsuleFileError, match="cannot write"):
        draw_head_map(head_map, tmp_path / "missing" / "a.png")


def test_a_picture_that_fails_leaves_the_one_before(monkeypatch, tmp_path):
    path = draw_head_map(HeadMap.all_dense(2, 2), tmp_path / "map.png")
    before = path.read_bytes()
    monkeypatch.setattr(
        os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    with pytest.raises(CapsuleFileError, match="No space left"):
        draw_head_map(HeadMap.all_dense(3, 3), path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["map.png"]
