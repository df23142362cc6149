"""`capsight serve` answers the OpenAI chat API as transformers does, head map and capsules. Needs vLLM."""

from __future__ import annotations

import base64
import io
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest
import torch

pytest.importorskip("vllm")

import capsight
from capsight import HeadMap
from capsight.reference import load_reference_vlm, reference_path, split_prompt
from capsight.serving.export import export_checkpoint
from capsight.serving.method import PagedCapsules
from serving.ask_vllm import ENVIRONMENT

TOKENS, RETAINED = 12, 0.4


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """The address of a running server, and the model, processor and head map that it serves."""
    root, port = tmp_path_factory.mktemp("server"), free_port()
    model, processor = load_reference_vlm()
    head_map = HeadMap.from_pretrained("reference")
    export_checkpoint(reference_path(), root / "model", model, head_map=head_map, retained=RETAINED)
    command = [sys.executable, "-m", "capsight", "serve", str(root / "model"), "--port", str(port)]
    command += ["--images", "4", "--name", "tiny", "--", "--enforce-eager"]
    command += ["--max-model-len", "4096"]
    environment = os.environ | ENVIRONMENT | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    with (root / "log").open("w") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        for _ in range(600):
            if server.poll() is not None:
                pytest.fail((root / "log").read_text()[-6000:])
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2)
                break
            except OSError:
                time.sleep(1)
        else:
            pytest.fail("the server did not start:\n" + (root / "log").read_text()[-6000:])
        yield f"http://127.0.0.1:{port}", model, processor, head_map
    finally:
        server.terminate()
        try:
            server.wait(60)
        except subprocess.TimeoutExpired:
            server.kill()


def post(address, **body):
    data = json.dumps({"model": "tiny", "temperature": 0, "max_tokens": TOKENS} | body).encode()
    request = urllib.request.Request(
        f"{address}/v1/chat/completions", data, {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        return answer.read().decode()


def asked(prompt):
    content = []
    for scene in prompt.scenes:
        file = io.BytesIO()
        scene.image.save(file, "PNG")
        url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
        content.append({"type": "image_url", "image_url": {"url": url}})
    return [{"role": "user", "content": [*content, {"type": "text", "text": prompt.questions[0].text}]}]


def expected(prompt, model, processor, head_map):
    content = [{"type": "image"}] * len(prompt.scenes) + [{"type": "text", "text": prompt.questions[0].text}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    inputs = processor(text=[text], images=[[s.image for s in prompt.scenes]], return_tensors="pt")
    both = {"capsule": PagedCapsules(RETAINED), "head_map": head_map, "prefill": "sparse"}
    with torch.no_grad(), capsight.enable(model, **both) as fast:
        out = fast.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)
    return processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0]


def test_chat_with_images(served):
    address, *parts = served
    for number, count in enumerate((1, 4)):
        prompt = split_prompt("test", number, count)
        answer = json.loads(post(address, messages=asked(prompt)))["choices"][0]["message"]["content"]
        assert answer == expected(prompt, *parts)
        lines = post(address, messages=asked(prompt), stream=True).splitlines()
        pieces = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
        assert "".join(p["choices"][0]["delta"].get("content") or "" for p in pieces) == answer
    sampled = {"temperature": 1, "top_k": 1, "n": 2}  # vLLM takes n > 1 for sampling only
    both = json.loads(post(address, messages=asked(prompt), **sampled))["choices"]
    assert [choice["message"]["content"] for choice in both] == [answer] * 2


def test_too_many_images_are_refused_in_words(served):
    with pytest.raises(urllib.error.HTTPError) as refused:
        post(served[0], messages=asked(split_prompt("test", 0, 5)))
    assert refused.value.code == 400
    assert "image" in refused.value.read().decode()
