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

import numpy as np
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


def in_process(module, folder: Path, job, environment=None, timeout=900):
    """Run a job in `module`, a process of its own, and return what it has written."""
    job_file, answers = folder / "job.json", folder / "answers.json"
    answers.unlink(missing_ok=True)
    job_file.write_text(json.dumps(job))
    path = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    own = ENVIRONMENT | {"PYTHONPATH": path} | (environment or {})
    if (Path(job["model"]) / "capsule").is_dir():  # latents in float32, see `vllm_cases.float32`
        own["ATEN_CPU_CAPABILITY"] = "avx2"
    done = subprocess.run(
        [sys.executable, "-m", f"serving.{module}", str(job_file), str(answers)],
        env=os.environ | own,
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=folder,
    )
    assert answers.is_file(), done.stdout[-2000:] + done.stderr[-6000:]
    return json.loads(answers.read_text())


def engine_of(job):
    """The engine that a job asks for."""
    from vllm import LLM

    return LLM(model=job["model"], **(DEFAULTS | job["engine"]))


def prompt(text, files):
    """What vLLM takes; a file `.npy` is a clip of two frames a second."""
    data = {"image": [Image.open(file).convert("RGB") for file in files if not file.endswith(".npy")]}
    clips = [np.load(file) for file in files if file.endswith(".npy")]
    if clips:
        about = {"fps": 2.0, "do_sample_frames": False}
        data["video"] = [
            (clip, about | {"total_num_frames": len(clip), "frames_indices": list(range(len(clip)))})
            for clip in clips
        ]
    return {"prompt": text} | ({"multi_modal_data": data} if files else {})


def assert_same_answer(answer, tokens, right, end, beyond=1e-3):
    """An answer of a model that was not trained to go on past `end` is transformers'.

    Log-probabilities of a few uncertain words past the end may differ by `beyond`: of latents, one number in
    ten thousand is rounded to the next of its codes.
    """
    assert answer["tokens"] == tokens
    gaps = [abs(a - b) for a, b in zip(answer["logprobs"], right, strict=True)]
    answered = tokens.index(end) + 1 if end in tokens else len(tokens)
    assert max(gaps[:answered]) <= 1e-4
    gaps.sort()
    assert gaps[-1] <= beyond
    assert gaps[len(gaps) * 9 // 10] <= 1e-3


def logprobs(output):
    """Log-probabilities of the tokens of one answer."""
    return [entry[token].logprob for token, entry in zip(output.token_ids, output.logprobs, strict=True)]


def ask(folder: Path, model: Path, prompts, rounds=1, tokens=16, on=False, environment=None, **engine):
    """Run a job; of every round and prompt: token ids, log-probabilities, how many tokens were cached, and
    how many requests the engine has preempted so far.
    """
    job = {"model": str(model), "prompts": prompts, "rounds": rounds, "tokens": tokens, "on": on}
    return in_process("ask_vllm", folder, job | {"engine": engine}, environment)


def main(job_file: str, answers_file: str) -> None:
    from vllm import SamplingParams

    job = json.loads(Path(job_file).read_text())
    engine = engine_of(job)
    sampling = SamplingParams(temperature=0, max_tokens=job["tokens"], logprobs=1, ignore_eos=job["on"])
    rounds = []
    for _ in range(job["rounds"]):
        outputs = engine.generate([prompt(*given) for given in job["prompts"]], sampling, use_tqdm=False)
        counts = {metric.name: metric for metric in engine.get_metrics()}
        rounds.append(
            [
                {
                    "prompt": list(output.prompt_token_ids),
                    "tokens": list(output.outputs[0].token_ids),
                    "logprobs": logprobs(output.outputs[0]),
                    "cached": output.num_cached_tokens,
                    "preempted": counts["vllm:num_preemptions"].value,
                }
                for output in outputs
            ]
        )
    Path(answers_file).write_text(json.dumps(rounds))


if __name__ == "__main__":
    main(*sys.argv[1:])
