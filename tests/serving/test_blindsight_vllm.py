"""Head maps inside vLLM give the tokens and log-probabilities of transformers. Needs vLLM; CPU, fp32."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("vllm")

import capsight
from capsight import HeadMap
from capsight.blindsight import Category, MaskOptions
from capsight.reference import load_reference_vlm, reference_path, split_prompt
from capsight.serving.export import export_checkpoint
from judging.loader import WEIGHTS, judge_prompt, load_judge
from serving.ask_vllm import ask

COUNTS = (1, 2, 4, 8, 3)
TOKENS = 16


@pytest.fixture(scope="module")
def vlm():
    return load_reference_vlm()


@pytest.fixture(scope="module")
def prompts(tmp_path_factory, vlm):
    """Text, picture files and model inputs of questions about one to eight pictures, and of one without."""
    folder, made = tmp_path_factory.mktemp("pictures"), []
    for number, count in enumerate((*COUNTS, 0)):
        prompt = split_prompt("test", number, count or 1)
        files = [str(folder / f"{number}-{index}.png") for index in range(count)]
        scenes = prompt.scenes[:count]
        for scene, file in zip(scenes, files, strict=True):
            scene.image.save(file)
        made.append(asked(vlm[1], [scene.image for scene in scenes], prompt.questions[0].text, files))
    return made


def asked(processor, images, question, files):
    """Text, picture files and model inputs of a question."""
    content = [{"type": "image"}] * len(images) + [{"type": "text", "text": question}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    given = {"images": [list(images)]} if images else {}
    return text, files, processor(text=[text], return_tensors="pt", **given)


def expected(model, inputs, head_map, **options):
    """Tokens and their log-probabilities on the transformers path."""
    options = {"max_new_tokens": TOKENS, "do_sample": False, "return_dict_in_generate": True} | options
    with torch.no_grad(), capsight.enable(model, head_map=head_map, prefill="sparse") as fast:
        out = fast.generate(**inputs, **options, output_logits=True)
    tokens = out.sequences[0, inputs["input_ids"].shape[1] :].tolist()
    rows = torch.stack(out.logits)[:, 0].float().log_softmax(-1)
    return tokens, [rows[i, token].item() for i, token in enumerate(tokens)]


COUNTS_OF_HEADS = {
    Category.DENSE: 4,
    Category.SINK: 44,
    Category.INTRA_IMAGE: 8,
    Category.INTRA_IMAGE_SINK: 8,
}
MAPS = {
    "calibrated": HeadMap.from_pretrained("reference"),
    "narrow": HeadMap.random(8, 8, COUNTS_OF_HEADS, seed=3, options=MaskOptions(False, 3, 2)),
}
"""The second one leaves out so much that other answers come out."""


@pytest.fixture(scope="module")
def exported(tmp_path_factory, vlm, prompts):
    """By map: an exported folder, and what transformers says with it."""
    root, found = tmp_path_factory.mktemp("exported"), {}
    for name, head_map in MAPS.items():
        export_checkpoint(reference_path(), root / name, vlm[0], head_map=head_map)
        found[name] = root / name, [expected(vlm[0], inputs, head_map) for _, _, inputs in prompts]
    return found


def check(found, right, prompts):
    for answer, (tokens, logprobs), (_, _, inputs) in zip(found, right, prompts, strict=True):
        assert answer["prompt"] == inputs["input_ids"][0].tolist()
        assert answer["tokens"] == tokens
        gaps = [abs(a - b) for a, b in zip(answer["logprobs"], logprobs, strict=True)]
        assert max(gaps) <= 1e-4


WAYS = {
    "single chunk, then prefix-cached": {"rounds": 2},
    "chunks of 64 tokens": {"max_num_batched_tokens": 64, "max_num_seqs": 4, "enable_prefix_caching": False},
    "engine in another process": {"environment": {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}},
    "heads shared by two processes": {
        "tensor_parallel_size": 2,
        "environment": {"VLLM_CPU_OMP_THREADS_BIND": "0|1", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"},
    },
}


@pytest.mark.parametrize(
    ("name", "way"), [("calibrated", next(iter(WAYS))), *(("narrow", way) for way in WAYS)]
)
def test_tokens_are_those_of_transformers(tmp_path, exported, prompts, name, way):
    folder, right = exported[name]
    rounds = ask(tmp_path, folder, [(text, files) for text, files, _ in prompts], tokens=TOKENS, **WAYS[way])
    for found in rounds:
        check(found, right, prompts)
    if len(rounds) > 1:
        read = sum(len(answer["prompt"]) for answer in rounds[1])
        assert sum(answer["cached"] for answer in rounds[1]) > 0.7 * read


def test_preempted(tmp_path, exported, vlm, prompts):
    """A pool that holds the prompts and not what is generated: requests lose their blocks and start again."""
    given, blocks = prompts[2:5], 0
    options = {"max_new_tokens": 40, "eos_token_id": 10**9}
    right = [expected(vlm[0], inputs, MAPS["narrow"], **options) for _, _, inputs in given]
    for _, _, inputs in given:
        blocks += -(-inputs["input_ids"].shape[1] // 32)
    tight = {"num_gpu_blocks_override": blocks + 2, "enable_prefix_caching": False, "max_model_len": 1536}
    found = ask(
        tmp_path,
        exported["narrow"][0],
        [(text, files) for text, files, _ in given],
        tokens=40,
        on=True,
        **tight,
    )[0]
    assert found[0]["preempted"] > 0
    check(found, right, given)


def test_qwen2_vl(tmp_path):
    """The other family: a judge of 49 tokens a picture, four query heads to a KV head."""
    vlm, processor = load_judge("mosaic")
    counts = {Category.DENSE: 4, Category.SINK: 20, Category.INTRA_IMAGE: 12, Category.INTRA_IMAGE_SINK: 12}
    head_map = HeadMap.random(6, 8, counts, seed=1, options=MaskOptions(False, 2, 4))
    export_checkpoint(WEIGHTS / "mosaic", tmp_path / "model", vlm, head_map=head_map)
    given = []
    for number, count in enumerate((4, 2, 1)):
        prompt = judge_prompt("mosaic", "test", number, count)
        files = [str(tmp_path / f"{number}-{index}.png") for index in range(count)]
        for picture, file in zip(prompt.images, files, strict=True):
            picture.save(file)
        given.append(asked(processor, prompt.images, prompt.questions[0].text, files))
    right = [expected(vlm, inputs, head_map) for _, _, inputs in given]
    found = ask(tmp_path, tmp_path / "model", [(text, files) for text, files, _ in given])[0]
    check(found, right, given)
    dense = [expected(vlm, inputs, None) for _, _, inputs in given]
    assert max(abs(a[1][0] - b[1][0]) for a, b in zip(dense, right, strict=True)) > 1e-3


def test_the_narrow_map_changes_answers(vlm, prompts, exported):
    dense = [expected(vlm[0], inputs, None)[0] for _, _, inputs in prompts]
    assert sum(a != b for a, (b, _) in zip(dense, exported["narrow"][1], strict=True)) >= 3
