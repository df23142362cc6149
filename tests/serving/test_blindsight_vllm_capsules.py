"""A head map in the prefill and capsules afterwards, both inside vLLM, give the tokens of transformers."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("vllm")

import capsight
from capsight import HeadMap, KVCapsule
from capsight.blindsight import Category, MaskOptions
from capsight.reference import load_reference_vlm, reference_path, split_prompt
from capsight.serving.export import export_checkpoint
from capsight.serving.method import PagedCapsules
from serving.ask_vllm import ask, assert_same_answer
from serving.drive_vllm import drive
from serving.vllm_cases import float32  # noqa: F401

RETAINED, TOKENS = 0.4, 40
COUNTS = (8, 2, 3, 5, 1, 0)
HEAD_MAP = HeadMap.random(
    8, 8, {Category.DENSE: 16, Category.SINK: 32, Category.INTRA_IMAGE: 8, Category.INTRA_IMAGE_SINK: 8},
    seed=3, options=MaskOptions(False, 3, 2),
)  # fmt: skip


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    return made(tmp_path_factory.mktemp("both"), PagedCapsules(RETAINED), COUNTS, retained=RETAINED)


def made(root, method, counts, **kept):
    """An exported folder, requests, and the tokens and log-probabilities of transformers."""
    model, processor = load_reference_vlm()
    export_checkpoint(reference_path(), root / "model", model, head_map=HEAD_MAP, **kept)
    requests, right = [], []
    for number, count in enumerate(counts):
        prompt = split_prompt("test", 20 + number, count or 1)
        images = [scene.image for scene in prompt.scenes[:count]]
        files = [str(root / f"{number}-{index}.png") for index in range(count)]
        for image, file in zip(images, files, strict=True):
            image.save(file)
        content = [{"type": "image"}] * count + [{"type": "text", "text": prompt.questions[0].text}]
        text = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        inputs = processor(text=[text], return_tensors="pt", **({"images": [images]} if images else {}))
        options = {"max_new_tokens": TOKENS, "do_sample": False, "eos_token_id": [-1], "pad_token_id": 0}
        both = {"capsule": method, "head_map": HEAD_MAP, "prefill": "sparse"}
        with torch.no_grad(), capsight.enable(model, **both) as fast:
            out = fast.generate(**inputs, **options, return_dict_in_generate=True, output_logits=True)
        tokens = out.sequences[0, inputs["input_ids"].shape[1] :].tolist()
        rows = torch.stack(out.logits)[:, 0].float().log_softmax(-1)
        requests.append((text, files, 1))
        right.append((tokens, [rows[i, token].item() for i, token in enumerate(tokens)]))
    return root / "model", requests, right


def check(found, right, beyond=1e-3):
    for (answer,), (tokens, logprobs) in zip(found["answers"], right, strict=True):
        assert_same_answer(answer, tokens, logprobs, 4, beyond)


def test_whole_prompts_and_again_from_the_prefix_cache(tmp_path, job):
    folder, requests, right = job
    prompts = [(text, files) for text, files, _ in requests]
    rounds = ask(tmp_path, folder, prompts, 2, TOKENS, True, max_num_batched_tokens=2048)
    for answered in rounds:
        check({"answers": [[one] for one in answered]}, right)
    assert rounds[1][0]["cached"] > rounds[0][0]["cached"]


def test_chunks_in_a_pool_that_preempts(tmp_path, job):
    folder, requests, right = job
    few = [index for index, count in enumerate(COUNTS) if count <= 3] * 5
    tight = {"max_model_len": 448, "max_num_batched_tokens": 64, "num_gpu_blocks_override": 15}
    found = drive(tmp_path, folder, [requests[index] for index in few], tokens=TOKENS, **tight)
    assert found["seen"]["preempted"] > 0, found["seen"]
    assert found["seen"]["leaked"] == 0
    check(found, [right[index] for index in few])


def test_latents_in_an_engine_of_its_own_process_again_from_the_prefix_cache(tmp_path):
    capsule = KVCapsule.from_pretrained("reference")
    folder, requests, right = made(tmp_path, capsule, (8, 2, 3, 1, 0), capsule=capsule)
    prompts = [(text, files) for text, files, _ in requests]
    alone = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    chunks = {"max_num_batched_tokens": 160, "environment": alone}
    rounds = ask(tmp_path, folder, prompts, 2, TOKENS, True, **chunks)
    for answered in rounds:
        check({"answers": [[one] for one in answered]}, right, beyond=0.02)
    assert rounds[1][0]["cached"] > rounds[0][0]["cached"]


def test_heads_shared_by_two_processes(tmp_path, job):
    folder, requests, right = job
    environment = {"VLLM_CPU_OMP_THREADS_BIND": "0|1", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    options = {"watch": False, "tensor_parallel_size": 2, "environment": environment}
    check(drive(tmp_path, folder, requests, tokens=TOKENS, **options), right)
