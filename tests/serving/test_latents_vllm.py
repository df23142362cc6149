"""Latents in vLLM's paged memory, of prompts and models that are unlike the usual. Needs vLLM; CPU, fp32."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("vllm")

from transformers import AutoProcessor

from capsight import KVCapsule
from capsight.reference import load_reference_vlm, reference_path, split_prompt
from capsight.serving.export import export_checkpoint
from judging.loader import WEIGHTS, judge_prompt, load_judge
from serving.ask_vllm import ask
from serving.drive_vllm import drive
from serving.vllm_cases import TOKENS, Kept, check, expected, float32, kept  # noqa: F401

WORDS = [question.text for question in split_prompt("test", 0, 2).questions]
LONG = " ".join(WORDS * 2)
SHAPES = {
    "of all sizes, one of a few tokens": [(8, 8), (640, 480), (200, 20), (64, 32), WORDS[0]],
    "text around and between": [LONG, (224, 224), WORDS[1], (448, 224), LONG],
    "in the second turn": [LONG, None, (224, 448), WORDS[0]],
    "in both turns": [(224, 224), WORDS[0], None, (112, 448), WORDS[1]],
    "at the very end": [WORDS[0], (448, 224)],
    "nothing else": [(224, 224)],
    "strips": [part for width in range(5) for part in ((20, 200 + 56 * width), WORDS[width])],
    "eight that are too small to free a block": [*[(30, 30)] * 8, WORDS[0]],
    "none": [LONG],
}  # text, sizes of pictures; None: the next turn


@pytest.fixture(scope="module")
def vlm():
    return load_reference_vlm()


@pytest.fixture(scope="module")
def exported(tmp_path_factory, vlm):
    out = tmp_path_factory.mktemp("exported") / "model"
    export_checkpoint(reference_path(), out, vlm[0], **kept("latents").options)
    return out


def shaped(processor, folder, number, parts):
    """Text, picture files and model inputs of a prompt."""
    turns, pictures, files = [[]], [], []
    for part in parts:
        if part is None:
            turns.append([])
        elif isinstance(part, str):
            turns[-1].append({"type": "text", "text": part})
        else:
            turns[-1].append({"type": "image"})
            scene = split_prompt("test", 400 + len(pictures), 1).scenes[0]
            pictures.append(scene.image.convert("RGB").resize(part))
            files.append(str(folder / f"{number}-{len(files)}.png"))
            pictures[-1].save(files[-1])
    messages = [{"role": "user", "content": turn} for turn in turns]
    if len(messages) > 1:
        messages.insert(1, {"role": "assistant", "content": [{"type": "text", "text": "yes"}]})
    text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    images = {"images": [pictures]} if pictures else {}
    return text, files, processor(text=[text], return_tensors="pt", **images)


def test_prompts_of_all_shapes_whose_long_answers_are_read_again(tmp_path, vlm, exported):
    """Chunks are smaller than pictures, and requests are preempted when they have generated much."""
    kind = kept("latents")
    made = [shaped(vlm[1], tmp_path, number, parts) for number, parts in enumerate(SHAPES.values())]
    plans = [kind.plan(vlm[0], inputs) for _, _, inputs in made]
    assert [plan is None for plan in plans] == [False] * 7 + [True] * 2
    right = [expected(vlm[0], x[2], plan and kind.method, 100) for x, plan in zip(made, plans, strict=True)]
    found = drive(
        tmp_path,
        exported,
        [(text, files, 1) for text, files, _ in made] * 2,
        tokens=100,
        max_model_len=960,
        max_num_batched_tokens=48,
        num_gpu_blocks_override=32,
        mm_processor_cache_gb=1,
    )
    assert found["seen"]["preempted"] > 0, found["seen"]
    check(found, right * 2, kind.beyond)


def test_a_clip_and_a_picture(tmp_path, vlm, exported):
    """What `capsight serve` does not let through, and vLLM by itself does."""
    processor = AutoProcessor.from_pretrained(exported)
    frames = [split_prompt("test", 300 + i, 1).scenes[0].image.convert("RGB") for i in range(4)]
    clip = np.stack([np.array(frame.resize((224, 224))) for frame in frames])
    picture = str(tmp_path / "picture.png")
    frames[0].save(picture)
    text, _, _ = shaped(vlm[1], tmp_path, 0, [(224, 224), (224, 224), WORDS[0]])
    text = text.replace(processor.image_token, processor.video_token, 1)
    inputs = processor(
        text=[text],
        images=[frames[0]],
        videos=[clip],
        videos_kwargs={"do_sample_frames": False},
        return_tensors="pt",
    )
    inputs["second_per_grid_ts"] = torch.tensor([1.0])
    right = kept("latents").answer(vlm[0], inputs)
    file = str(tmp_path / "clip.npy")
    np.save(file, clip)
    job, limits = [(text, [picture, file], 1)], {"image": 1, "video": 1}
    found = drive(tmp_path, exported, job, TOKENS, limit_mm_per_prompt=limits)
    check(found, [right], kept("latents").beyond)


def test_qwen2_vl(tmp_path):
    """The other family: a judge of 49 tokens a picture, four query heads to a KV head."""
    vlm, processor = load_judge("mosaic")

    def given(split, number, count):
        prompt = judge_prompt("mosaic", split, number, count)
        content = [{"type": "image"}] * count + [{"type": "text", "text": prompt.questions[0].text}]
        text = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        return prompt, text, processor(text=[text], images=[list(prompt.images)], return_tensors="pt")

    samples = [given("calibration", number, 4)[2] for number in range(6)]
    capsule = KVCapsule.fit(vlm, processor, samples, 0.1, progress=False)
    kind = Kept.latents(capsule)
    export_checkpoint(WEIGHTS / "mosaic", tmp_path / "model", vlm, capsule=capsule)
    asked_for, right = [], []
    for number, count in enumerate((4, 4, 2)):
        prompt, text, inputs = given("test", number, count)
        files = [str(tmp_path / f"{number}-{index}.png") for index in range(count)]
        for picture, file in zip(prompt.images, files, strict=True):
            picture.save(file)
        asked_for.append((text, files))
        right.append(kind.answer(vlm, inputs))
        assert count < 4 or kind.plan(vlm, inputs)
    (found,) = ask(tmp_path, tmp_path / "model", asked_for, 1, 16, True)
    for one, (tokens, logprobs) in zip(found, right, strict=True):
        assert one["tokens"] == tokens[:16]
        gaps = [abs(a - b) for a, b in zip(one["logprobs"], logprobs, strict=False)]
        assert max(gaps) <= kind.beyond
        assert gaps[0] <= 1e-4
