"""Capsules of both kinds in vLLM's paged memory give the tokens of transformers. Needs vLLM; CPU, fp32."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm")

from capsight.reference import load_reference_vlm, reference_path
from capsight.serving.export import export_checkpoint
from serving.ask_vllm import ask
from serving.drive_vllm import drive
from serving.vllm_cases import COUNTS, SIZE, TOKENS, all_asked, asked, check, float32, kept, requests  # noqa: F401


@pytest.fixture(scope="module")
def vlm():
    return load_reference_vlm()


@pytest.fixture(scope="module")
def prompts(tmp_path_factory, vlm):
    return all_asked(vlm[1], tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module", params=["slots", "latents"])
def kind(request):
    return kept(request.param)


@pytest.fixture(scope="module")
def exported(tmp_path_factory, vlm, kind):
    out = tmp_path_factory.mktemp("exported") / "model"
    export_checkpoint(reference_path(), out, vlm[0], **kind.options)
    return out


@pytest.fixture(scope="module")
def right(vlm, prompts, kind):
    return [kind.answer(vlm[0], inputs) for _, _, inputs in prompts]


def test_all_at_once_and_several_answers(tmp_path, vlm, kind, exported, prompts, right):
    found = drive(tmp_path, exported, requests(prompts, {2: 2, 7: 3}), tokens=TOKENS)
    check(found, right, kind.beyond)
    assert [len(answers) for answers in found["answers"]] == [1, 1, 2, 1, 1, 1, 1, 3]
    plans = [kind.plan(vlm[0], inputs) for _, _, inputs in prompts]
    few = [11, 2, 2, 11, None, 3, 7, 7] if "retained" in kind.options else [2, 1, 1, 2, None, 1, 1, 1]
    assert [plan and plan.kept_blocks for plan in plans] == few


def test_chunks_through_images_and_a_request_given_up(tmp_path, kind, exported, prompts, right):
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
    check(found, [*right[:3], *right[4:]], kind.beyond)


def test_a_pool_that_preempts(tmp_path, kind, exported, prompts, right):
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
    check(found, [right[i] for i in few], kind.beyond)


def test_pictures_that_are_in_memory(tmp_path, kind, exported, vlm):
    """Other questions about the same pictures, and about fewer of them, which then shrink elsewhere.

    Chunks end within prompts, so that a request also finds what another is still reading.
    """
    counts = [(3, 0), (2, 0), (3, 2), (1, 3), (3, 0)]
    made = [asked(vlm[1], tmp_path, count, 90, question, of=3) for count, question in counts]
    prompts = [(text, files) for text, files, _ in made]
    rounds = ask(tmp_path, exported, prompts, 2, TOKENS, True, max_num_batched_tokens=192)
    answers = [kind.answer(vlm[0], inputs) for _, _, inputs in made[:4]]
    for answered in rounds:
        found = {"answers": [[one] for one in answered], "seen": {}}
        check(found, [*answers, answers[0]], kind.beyond)
    plan = kind.plan(vlm[0], made[0][2])
    assert rounds[1][0]["cached"] >= SIZE * plan.written.start - 64
    assert rounds[1][4]["cached"] == SIZE * plan.written.start


@pytest.mark.parametrize("kind", ["slots"], indirect=True)
def test_heads_shared_by_two_processes_of_an_engine_in_a_third(tmp_path, exported, prompts, right):
    found = drive(
        tmp_path,
        exported,
        requests(prompts),
        tokens=TOKENS,
        watch=False,
        tensor_parallel_size=2,
        environment={"VLLM_CPU_OMP_THREADS_BIND": "0|1", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"},
    )
    check(found, right)
