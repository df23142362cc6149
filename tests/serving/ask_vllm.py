"""One vLLM engine in a process of its own: `python -m serving.ask_vllm JOB.json ANSWERS.json`.

A job has `model` (a folder), `prompts` (text and picture files each), `rounds` (how often they are asked, all
at once), `tokens` (how many to generate), `on` (whether past the end token) and `engine` (arguments of
`vllm.LLM`).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from PIL import Image

TESTS = Path(__file__).resolve().parents[1]
DEFAULTS = {
    "enforce_eager": True,
    "dtype": "float32",
    "block_size": 32,
    "max_model_len": 4096,
    "max_num_batched_tokens": 4096,
    "max_num_seqs": 8,
    "limit_mm_per_prompt": {"image": 8, "video": 0},
    "mm_processor_cache_gb": 0,
    "disable_log_stats": False,
}
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_CI_ENV": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
}


def ask(folder: Path, model: Path, prompts, rounds=1, tokens=16, on=False, environment=None, **engine):
    """Run a job; of every round and prompt: token ids, log-probabilities, how many tokens were cached, and
    how many requests the engine has preempted so far.
    """
    job, answers = folder / "job.json", folder / "answers.json"
    answers.unlink(missing_ok=True)
    given = {"model": str(model), "prompts": prompts, "rounds": rounds, "tokens": tokens}
    given["on"] = on
    job.write_text(json.dumps(given | {"engine": engine}))
    path = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", "serving.ask_vllm", str(job), str(answers)],
        env=os.environ | ENVIRONMENT | (environment or {}) | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=900,
        cwd=folder,
    )
    assert answers.is_file(), done.stdout[-2000:] + done.stderr[-6000:]
    return json.loads(answers.read_text())


def main(job_file: str, answers_file: str) -> None:
    from vllm import LLM, SamplingParams

    job = json.loads(Path(job_file).read_text())
    engine = LLM(model=job["model"], **(DEFAULTS | job["engine"]))
    sampling = SamplingParams(temperature=0, max_tokens=job["tokens"], logprobs=1, ignore_eos=job["on"])
    found = []
    for _ in range(job["rounds"]):
        asked = [
            {"prompt": text, "multi_modal_data": {"image": [Image.open(p).convert("RGB") for p in pictures]}}
            if pictures
            else {"prompt": text}
            for text, pictures in job["prompts"]
        ]
        outputs = engine.generate(asked, sampling, use_tqdm=False)
        counts = {metric.name: metric for metric in engine.get_metrics()}
        found.append(
            [
                {
                    "prompt": list(output.prompt_token_ids),
                    "tokens": list(output.outputs[0].token_ids),
                    "logprobs": [
                        entry[token].logprob
                        for token, entry in zip(
                            output.outputs[0].token_ids, output.outputs[0].logprobs, strict=True
                        )
                    ],
                    "cached": output.num_cached_tokens,
                    "preempted": counts["vllm:num_preemptions"].value,
                }
                for output in outputs
            ]
        )
    Path(answers_file).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
