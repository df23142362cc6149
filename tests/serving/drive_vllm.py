"""One vLLM engine in a process of its own, watched: `python -m serving.drive_vllm JOB.json ANSWERS.json`.

A job has `model` (a folder), `requests` (text, picture files, how many answers), `tokens` (how many to
generate), `abort` (which requests are given up while their prompts are read, or else soon after), `engine`
(arguments of `vllm.LLM`) and `watch` (whether the engine runs in this process, so that its scheduler can be
looked at).
"""

from __future__ import annotations

import json
import sys
from itertools import islice
from pathlib import Path

from serving.ask_vllm import engine_of, in_process, logprobs, prompt

AT_ONCE = 24
"""Requests that the engine is given at a time."""


def drive(
    folder: Path,
    model: Path,
    requests,
    tokens=16,
    abort=(),
    environment=None,
    watch=True,
    timeout=900,
    **engine,
):
    """Run a job; answers by request (None if it was given up), and what was seen of the scheduler."""
    job = {
        "model": str(model),
        "requests": requests,
        "tokens": tokens,
        "abort": list(abort),
        "watch": watch,
        "engine": engine,
    }
    return in_process("drive_vllm", folder, job, environment, timeout)


def answer(output):
    """Tokens and their log-probabilities of each answer to a request."""
    return [
        {"tokens": list(one.token_ids), "logprobs": logprobs(one)}
        for one in sorted(output.outputs, key=lambda one: one.index)
    ]


def watched(engine, job, sampling):
    """Step by step, with an eye on the scheduler."""
    llm = engine.llm_engine
    scheduler = llm.engine_core.engine_core.scheduler
    pool = scheduler.kv_cache_manager.block_pool
    asked = iter(enumerate(job["requests"]))
    waiting = list(islice(asked, AT_ONCE))
    answers, abort = [None] * len(job["requests"]), job["abort"]
    running, most_used, steps, preempted = 0, 0, 0, set()
    while waiting or llm.has_unfinished_requests():
        for index, (text, files, count) in waiting:
            llm.add_request(str(index), prompt(text, files), sampling(count))
        outputs = llm.step()
        waiting = list(islice(asked, max(AT_ONCE - len(scheduler.requests), 0)))
        steps += 1
        running = max(running, len(scheduler.running))
        most_used = max(most_used, pool.num_gpu_blocks - 1 - pool.get_num_free_blocks())
        preempted |= {r.request_id for r in scheduler.requests.values() if r.num_preemptions}
        if abort:
            begun = {
                r.request_id
                for r in scheduler.requests.values()
                if 0 < r.num_computed_tokens < r.num_prompt_tokens or r.num_output_tokens > 4
            }
            for index in [i for i in abort if str(i) in {x.split("-")[0] for x in begun}]:
                llm.abort_request([str(index)])
                abort = [i for i in abort if i != index]
        for output in outputs:
            if output.finished and str(output.request_id) not in {str(i) for i in job["abort"]}:
                answers[int(output.request_id)] = answer(output)
    seen = {"running": running, "steps": steps, "preempted": len(preempted), "not aborted": abort}
    leaked = pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()
    return answers, seen | {"blocks": pool.num_gpu_blocks, "most used": most_used, "leaked": leaked}


def main(job_file: str, answers_file: str) -> None:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    job = json.loads(Path(job_file).read_text())
    engine = engine_of(job)

    def sampling(count):
        return SamplingParams(
            temperature=1,
            top_k=1,  # greedy, of which vLLM gives one answer only
            max_tokens=job["tokens"],
            logprobs=0,
            ignore_eos=True,
            n=count,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    if job["watch"]:
        answers, seen = watched(engine, job, sampling)
    else:
        prompts = [prompt(text, files) for text, files, _ in job["requests"]]
        each = [sampling(count) for _, _, count in job["requests"]]
        answers = [answer(output) for output in engine.generate(prompts, each, use_tqdm=False)]
        seen = {}
    Path(answers_file).write_text(json.dumps({"answers": answers, "seen": seen}))


if __name__ == "__main__":
    main(*sys.argv[1:])
