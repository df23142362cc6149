"""Rotary positions out of the layout, against those that each model works out for itself."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from capsight.layout import PromptLayout, build_layout
from capsight.layout.positions import positions_after, rope_deltas, rope_positions
from tiny import FAMILIES, clip
from tiny.base import TinyVLM

QWEN3 = ["qwen3_vl", "qwen3_5", "qwen3_5_moe"]
GLM = ["glm4v", "glm4v_moe", "glm46v", "glm_ocr"]
VIDEOS = ["qwen2_vl", "qwen2_5_vl", *QWEN3, *GLM, "llava_onevision", "internvl", "smolvlm"]
GRIDS = ["qwen2_vl", "qwen2_5_vl", *QWEN3, *GLM]


def prompts(vlm: TinyVLM) -> dict[str, object]:
    """Three rows of different length: two pictures, none, one of another size."""
    several = [vlm.picture(1), vlm.picture(2, vlm.other_size)]
    return vlm.inputs(
        [(several, "what is it"), ([], "hi"), ([vlm.picture(3, vlm.other_size)], "a longer one")]
    )


def of_the_model(vlm: TinyVLM, inputs: dict[str, object], new: int) -> torch.Tensor:
    """Positions `[3, B, S + new]` that the text model is given while the model generates."""
    seen: list[torch.Tensor] = []

    def note(module: object, args: object, kwargs: dict[str, torch.Tensor]) -> None:
        positions = kwargs["position_ids"]
        batch = len(inputs["input_ids"])
        positions = positions[-3:] if positions.ndim == 3 else positions.expand(3, *positions.shape)
        seen.append(positions.expand(3, batch, -1))

    hook = vlm.model.get_decoder().register_forward_pre_hook(note, with_kwargs=True)
    try:
        vlm.model.generate(**inputs, max_new_tokens=new + 1, min_new_tokens=new + 1, do_sample=False)
    finally:
        hook.remove()
    return torch.cat(seen, -1)


def check(vlm: TinyVLM, inputs: dict[str, object], new: int = 4) -> None:
    layout = build_layout(inputs, vlm.config)
    expected = of_the_model(vlm, inputs, new)
    own = torch.cat([rope_positions(layout, vlm.config), positions_after(layout, vlm.config, new)], -1)
    assert own.dtype == torch.int64
    assert torch.equal(own, expected)
    again = PromptLayout.from_dict(json.loads(json.dumps(layout.to_dict())))
    assert torch.equal(rope_positions(again, vlm.config), own[..., : layout.length])


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_a_padded_batch_with_several_pictures(name: str) -> None:
    vlm = FAMILIES[name]()
    check(vlm, prompts(vlm))


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_text_alone(name: str) -> None:
    vlm = FAMILIES[name]()
    check(vlm, vlm.inputs([([], "what"), ([], "what is it")]))


@pytest.mark.parametrize("frames", [4, 16])
@pytest.mark.parametrize("name", VIDEOS)
def test_videos(name: str, frames: int) -> None:
    vlm = FAMILIES[name]()
    clips = [clip(seed, frames) for seed in range(3)]
    check(vlm, vlm.video_inputs([(clips[:1], "a"), (clips[1:], "a longer one")]))


@pytest.mark.parametrize("name", [name for name in GRIDS if name not in GLM])  # GLM takes one kind a prompt
def test_pictures_between_videos(name: str) -> None:
    vlm = FAMILIES[name]()
    text = [vlm.template.format(images=vlm.placeholder + vlm.video_placeholder + vlm.placeholder, text="a")]
    pictures = [[vlm.picture(1), vlm.picture(2, vlm.other_size)]]
    given = vlm.processor(text=text, images=pictures, videos=[clip(1, 12)], padding=True, return_tensors="pt")
    check(vlm, given)


@pytest.mark.parametrize("words", ["{}what", "{}\n\nwhat", "{}\nwhat", "{}\n{}{}and", "{} and {}what"])
@pytest.mark.parametrize("tagged", [False, True])
def test_slices_on_a_canvas(words: str, tagged: bool) -> None:
    """Two rows of slices; newlines after a picture, which are markers; pictures with nothing between."""
    vlm = FAMILIES["minicpmv4_7"]()
    text = vlm.template.format(images="", text=words.format(*[vlm.placeholder] * words.count("{}")))
    sizes = [(256, 256), (128, 128), (128, 384)]
    pictures = [vlm.picture(n, sizes[n]) for n in range(words.count("{}"))]
    given = vlm.process([text, "a"], [pictures, []], use_image_id=tagged)
    check(vlm, given)


@pytest.mark.parametrize("seconds", [0.1, 1 / 3, 0.35, 0.7, 1.9])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_times_between_integers_are_rounded_as_the_model_does(seconds: float, as_tensor: bool) -> None:
    vlm = FAMILIES["qwen2_5_vl"]()
    inputs = vlm.video_inputs([([clip(0, 40)], "a"), ([clip(1, 24)], "bb")])
    inputs["second_per_grid_ts"] = [seconds, seconds / 3]
    if as_tensor:
        inputs["second_per_grid_ts"] = torch.tensor(inputs["second_per_grid_ts"])
    check(vlm, inputs)


@pytest.mark.parametrize("name", GRIDS)
def test_the_offset_is_the_models_own(name: str) -> None:
    vlm = FAMILIES[name]()
    for inputs in (prompts(vlm), vlm.video_inputs([([clip(0, 4)], "a"), ([clip(1), clip(2)], "bb")])):
        given = {k: v for k, v in inputs.items() if k in vlm.model.model.get_rope_index.__code__.co_varnames}
        positions, deltas = vlm.model.model.get_rope_index(**given)
        layout = build_layout(inputs, vlm.config)
        assert torch.equal(rope_positions(layout, vlm.config), positions)
        assert torch.equal(rope_deltas(layout, vlm.config), deltas)


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_positions_of_the_start_of_a_prompt_are_its_first_ones(name: str) -> None:
    vlm = FAMILIES[name]()
    layout = build_layout(prompts(vlm), vlm.config)
    images = layout.prefix(layout.last_vision_end)
    whole = rope_positions(layout, vlm.config)
    assert torch.equal(rope_positions(images, vlm.config), whole[..., : images.length])
    twice = rope_positions(layout.select([2, 0]).repeat(2), vlm.config)
    assert np.array_equal(twice, whole[:, [2, 2, 0, 0]])
