"""Many requests in a pool of memory that is too small for them: `python -m serving.soak_vllm --requests 500`.

From the folder `tests`, in an environment with vLLM. Requests with none to three pictures, new ones and such
as were asked about before, some given up while their prompts are read or soon after, in chunks and in so few
blocks that vLLM preempts all the time. Every answer must be that of an engine with room for all, and no block
may stay behind.
"""

from __future__ import annotations

import json
import random
import tempfile
from pathlib import Path
from typing import Any

import typer

from capsight import KVCapsule
from capsight.reference import load_reference_vlm, reference_path, split_prompt
from capsight.serving.export import export_checkpoint
from serving.drive_vllm import drive

COUNTS = (1, 2, 3, 1, 2, 0)


def questions(processor, folder, count, rng):
    """Text, picture files and number of answers of each request; one in three is about earlier pictures."""
    made, known = [], []
    for number in range(count):
        if known and rng.random() < 1 / 3:
            prompt, files = rng.choice(known)
        else:
            images = COUNTS[number % len(COUNTS)]
            prompt = split_prompt("test", number, images or 1)
            files = [str(folder / f"{number}-{index}.png") for index in range(images)]
            for scene, file in zip(prompt.scenes[:images], files, strict=True):
                scene.image.save(file)
            known.append((prompt, files))
        question = rng.choice(prompt.questions).text
        content = [{"type": "image"}] * len(files) + [{"type": "text", "text": question}]
        text = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        made.append((text, files, 1))
    return made


def main(
    requests: int = 500,
    tokens: int = 64,
    blocks: int = 15,
    retained: float = 0.4,
    latents: bool = False,
    seed: int = 0,
) -> None:
    """Ask everything twice, with room and without; slots, or latents of the shipped capsule."""
    rng = random.Random(seed)
    model, processor = load_reference_vlm()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        kept: dict[str, Any] = {"retained": retained}
        if latents:
            kept = {"capsule": KVCapsule.from_pretrained("reference")}
        export_checkpoint(reference_path(), folder / "model", model, **kept)
        asked = questions(processor, folder, requests, rng)
        given_up = sorted(rng.sample(range(requests), requests // 25))
        options = {"tokens": tokens, "timeout": 7200, "max_model_len": (blocks - 1) * 32}
        roomy = drive(folder, folder / "model", asked, **options)
        tight = drive(
            folder,
            folder / "model",
            asked,
            abort=given_up,
            max_num_batched_tokens=256,
            num_gpu_blocks_override=blocks,
            **options,
        )
    pairs = list(zip(roomy["answers"], tight["answers"], strict=True))
    both = [(a[0], b[0]) for a, b in pairs if b is not None]
    same = sum(a["tokens"] == b["tokens"] for a, b in both)
    gaps = (abs(x - y) for a, b in both for x, y in zip(a["logprobs"], b["logprobs"], strict=False))
    found = {
        "answers": len(both),
        "same": same,
        "largest gap": max(gaps),
        "roomy": roomy["seen"],
        "tight": tight["seen"],
    }
    print(json.dumps(found, indent=2))
    assert same == len(both) >= requests - len(given_up)
    assert tight["seen"]["preempted"] > 0
    assert roomy["seen"]["leaked"] == tight["seen"]["leaked"] == 0


if __name__ == "__main__":
    typer.run(main)
