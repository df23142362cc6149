"""Latents in vLLM's paged memory give the tokens of transformers. Needs vLLM; CPU, fp32."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm")

from capsight import KVCapsule
from capsight.layout import build_layout
from capsight.reference import load_reference_vlm, reference_path
from capsight.serving.export import export_checkpoint
from capsight.serving.plan import Latents
from judging.loader import WEIGHTS, judge_prompt, load_judge
from serving.ask_vllm import ask
from serving.drive_vllm import drive
from serving.vllm_cases import COUNTS, TOKENS, all_asked, asked, check, expected, requests

SIZE = 32
BEYOND = 0.02  # see `assert_same_answer`


@pytest.fixture(scope="module")
def vlm():
    return load_reference_vlm()


@pytest.fixture(scope="module")
def capsule():
    return KVCapsule.from_pretrained("reference")


@pytest.fixture(scope="module")
def prompts(tmp_path_factory, vlm):
    return all_asked(vlm[1], tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def exported(tmp_path_factory, vlm, capsule):
    out = tmp_path_factory.mktemp("exported") / "model"
    export_checkpoint(reference_path(), out, vlm[0], capsule=capsule)
    return out


def plan_of(model, inputs, capsule):
    """How the blocks of one prompt shrink."""
    codec = capsule.codecs[0]
    kind = Latents(len(capsule.codecs), codec.levels.nbytes, codec.mean.numel() * 4)
    row = build_layout(inputs, model.config).rows[0]
    return kind.plan([(block.start, block.end - 1) for block in row.blocks], row.length, SIZE)


def answer(model, inputs, capsule):
    """What transformers says; images that free no block stay as they are."""
    return expected(model, inputs, capsule if plan_of(model, inputs, capsule) else None)


@pytest.fixture(scope="module")
def right(vlm, prompts, capsule):
    return [answer(vlm[0], inputs, capsule) for _, _, inputs in prompts]


def test_all_at_once_and_several_answers(tmp_path, vlm, capsule, exported, prompts, right):
    found = drive(tmp_path, exported, requests(prompts, {2: 2, 7: 3}), tokens=TOKENS)
    check(found, right, BEYOND)
    assert [len(answers) for answers in found["answers"]] == [1, 1, 2, 1, 1, 1, 1, 3]
    plans = [plan_of(vlm[0], inputs, capsule) for _, _, inputs in prompts]
    assert [plan and plan.kept_blocks for plan in plans] == [2, 1, 1, 2, None, 1, 1, 1]


def test_chunks_through_images_and_a_request_given_up(tmp_path, exported, prompts, right):
    found = drive(
        tmp_path,
        exported,
        requests(prompts),
        tokens=TOKENS,
        abort=[3],
        max_model_len=864,
        max_num_batched_tokens=64,
        num_gpu_blocks_override=28,
    )
    assert found["answers"].pop(3) is None
    check(found, [*right[:3], *right[4:]], BEYOND)


def test_a_pool_that_preempts(tmp_path, exported, prompts, right):
    few = [i for i, count in enumerate(COUNTS) if count <= 3] * 5
    found = drive(
        tmp_path,
        exported,
        [requests(prompts)[i] for i in few],
        tokens=TOKENS,
        max_model_len=448,
        max_num_batched_tokens=448,
        num_gpu_blocks_override=15,
    )
    assert found["seen"]["preempted"] >= 3, found["seen"]
    check(found, [right[i] for i in few], BEYOND)


def test_pictures_that_are_in_memory(tmp_path, vlm, capsule, exported):
    """Other questions about the same pictures, and about fewer of them, which then shrink elsewhere.

    Chunks end within prompts, so that a request also finds what another is still reading.
    """
    counts = [(3, 0), (2, 0), (3, 2), (1, 3), (3, 0)]
    made = [asked(vlm[1], tmp_path, count, 90, question, of=3) for count, question in counts]
    prompts = [(text, files) for text, files, _ in made]
    rounds = ask(tmp_path, exported, prompts, 2, TOKENS, True, max_num_batched_tokens=192)
    answers = [answer(vlm[0], inputs, capsule) for _, _, inputs in made[:4]]
    for answered in rounds:
        found = {"answers": [[one] for one in answered], "seen": {}}
        check(found, [*answers, answers[0]], BEYOND)
    plan = plan_of(vlm[0], made[0][2], capsule)
    assert rounds[1][4]["cached"] == SIZE * plan.written.start


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
    export_checkpoint(WEIGHTS / "mosaic", tmp_path / "model", vlm, capsule=capsule)
    asked_for, right = [], []
    for number, count in enumerate((4, 4, 2)):
        prompt, text, inputs = given("test", number, count)
        files = [str(tmp_path / f"{number}-{index}.png") for index in range(count)]
        for picture, file in zip(prompt.images, files, strict=True):
            picture.save(file)
        asked_for.append((text, files))
        right.append(answer(vlm, inputs, capsule))
        assert count < 4 or plan_of(vlm, inputs, capsule)
    (found,) = ask(tmp_path, tmp_path / "model", asked_for, 1, 16, True)
    for one, (tokens, logprobs) in zip(found, right, strict=True):
        assert one["tokens"] == tokens[:16]
        gaps = [abs(a - b) for a, b in zip(one["logprobs"], logprobs, strict=False)]
        assert max(gaps) <= BEYOND
        assert gaps[0] <= 1e-4
