"""Small made-up results in the formats that the commands write, and pages from them."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise

import write_pages

from capsight.evaluation import MethodResult, Outcome, paired, summary
from capsight.evaluation.bench_row import BenchRow

MACHINE = {"cpu": "x86_64", "cores": 2, "threads": 2, "gpu": None, "torch": "2.13.0", "capsight": "0.1.0"}


def accuracy(**more: int):
    def result(right: int, share: float) -> MethodResult:
        outcomes = [
            Outcome(f"i{i // 2}", "find" if i % 2 else "plate", 1 + i % 2 * 3, i < right, True, 0.25)
            for i in range(40)
        ]
        return MethodResult(outcomes, int(1000 * share), 1000, 77_000 if share < 1 else 0)

    results = {
        "full": result(40, 1), "heads 0.4": result(39, 0.46), "heads 0.2": result(30, 0.28),
        "evict 0.4": result(35, 0.46), "evict 0.2": result(20, 0.28), "quanto-int4": result(38, 0.17),
        **{f"{name} 0.1": result(right, 0.28) for name, right in more.items()},
    }  # fmt: skip
    report = {"model": "reference", "protocol": "after", "methods": summary(results), "machine": MACHINE}
    return report | {"paired": paired(results, "heads")}


def bench():
    full = BenchRow("full", None, 2, 4, 500, 0.2, 100.0, 8000, 0, 0.001, 9000)
    ours = BenchRow("heads", 0.4, 2, 4, 500, 0.25, 80.0, 4000, 400, 0.01, None)
    graph = replace(ours, compiled=True, tokens_per_s=120.0)
    rows = [
        r.to_dict() | {"name": r.name, "ratios": r.ratios(full, full), "largest_batch": 7}
        for r in (full, ours, graph)
    ]
    fits = [{"method": "heads", "prompts": 8, "seconds": 3.0}]
    return {
        "model": "reference", "runs": 3, "new_tokens": 32, "kv_budget": 64_000_000, "rows": rows,
        "calibration": fits, "machine": MACHINE,
    }  # fmt: skip


def prefill():
    row = {"tokens": 4096, "images": 8, "seconds": {"25% dense": 0.1, "sdpa causal": 0.3}, "speedup": {}}
    row["speedup"]["25% dense"] = 3.0
    setup = {"heads": 8, "kv_heads": 2, "head_dim": 64, "dtype": "float32", "device": "cpu"}
    return {"machine": {"threads": 2}, "setup": setup, "rows": [row]}


def demo():
    side = {"kv_bytes": 100, "module_bytes": 0, "ttft_s": 1.0, "tokens_per_s": 10.0}
    side |= {"ttft_ratio": 1.0, "speed_ratio": 1.0, "steps": {"eager": {"speed_ratio": 1.0}}}
    ours = side | {"kv_bytes": 40, "module_bytes": 10}
    steps = {"eager": {"speed_ratio": 0.8}, "compiled": {"speed_ratio": 1.1}}
    return {"sides": {"full cache": side, "capsules": ours}, "heads": side | {"steps": steps}}


def maps(**facts):
    by_images = {n: {"attention_saved": 0.5, "exact_match": 95.0, "drop": 1.0} for n in ("4", "8")}
    row = {"group": "tolerance", "name": "output", "by_images": by_images}
    row |= {"exact_match": 95.0, "drop": 1.0, "agreement": 98.0, **facts}
    prompts = {"voting": 12, "held_out": 20, "test, each image count": 40}
    return {"machine": MACHINE, "prompts": prompts, "prompts, each image count": 20, "rows": [row]}


def ttft():
    row = {
        "variant": "calibrated",
        "ttft_s": 0.25,
        "speedup": 1.5,
        "attention_saved": 0.5,
        "prefill_saved": 0.1,
    }
    return {"machine": MACHINE, "models": [{"model": "a VLM", "tokens": 700, "images": 8, "rows": [row]}]}


def decode():
    row = {"tokens": 8192, "batch": 1, "dtype": "float32", "repeats": 7, "retained": 0.4}
    row |= {"speedup": {"heads": 2.0}, "seconds": {"heads": 0.001, "sdpa": 0.002}}
    row |= {"bytes": {"full": 100, "heads": 40}, "largest_difference": {"heads": 1e-6}}
    setup = {"heads": 28, "kv_heads": 4, "head_dim": 128, "text_tokens": 64}
    where = {"gpu": None, "cpu": "a CPU", "threads": 2, "torch": "2.13.0"}
    return {"machine": where, "setup": setup, "rows": [row]}


def decode_amx():
    (row,) = decode()["rows"]
    speedup, seconds = row["speedup"] | {"native, full": 1.5}, row["seconds"] | {"native, full": 0.0015}
    return decode() | {"rows": [row | {"speedup": speedup, "seconds": seconds}]}


def decode_joint():
    row = {"tokens": 8192, "batch": 8, "rank": 512, "code": "AVX2", "repeats": 5, "speedup": 0.5}
    row |= {"seconds": {"sdpa, grouped": 0.002, "joint": 0.004}}
    return decode() | {"rows": [row]}


def decode_reference():
    row = {"cache": "joint 0.05", "batch": 8, "ms_a_token": 12.5, "speed": 1.25, "quartiles": [1.2, 1.3]}
    return {"machine": decode()["machine"], "rows": [row]}


def peak_memory():
    row = {"cache": "joint 0.05", "peak_bytes": 9_000_000, "text_peak_bytes": 7_000_000, "held_bytes": -1}
    setup = {"batch": 8, "images": 8, "new_tokens": 32}
    return {"machine": MACHINE, "setup": setup, "rows": [row]}


def write(root, **files):
    for name, values in files.items():
        (root / "benchmarks" / "results" / f"{name}.json").write_text(json.dumps(values))
    write_pages.main(root)
    return (root / "README.md").read_text()


def tables_are_square(text):
    lines = text.splitlines()
    for before, line in pairwise(lines):
        if before.startswith("|") and line.startswith("|"):
            assert before.count("|") == line.count("|"), (before, line)
    return True


def decode_model():
    row = {"tokens": 8192, "batch": 1, "variant": "heads 0.4"}
    row |= {"tokens_per_s": 7.5, "speedup": 1.25, "cache_nbytes": 44_000_000}
    setup = {"parameters": 5.2e8, "dtype": "bfloat16", "new_tokens": 9, "runs": 3, "image_tokens": 1024}
    return {"machine": MACHINE, "setup": setup, "rows": [row]}


def smol():
    curve = [
        {"step": 10 * n, "tokens": 100 * n, "train": {"photo": n / 40, "word": 1.0}} for n in range(1, 31)
    ]
    card = {
        "right, by images and kind": {"1": {"photo": "3/4"}, "4": {"photo": "1/2", "word": "2/2"}},
        "right, %": {"1": 75.0, "4": 75.0},
        "test prompts of each": 4,
        "curve, tower": [{"step": 40, "seconds": 60.0, "tokens right, photo": 0.5}],
        "curve, answers": curve,
    }
    shares = ["first token", "own image", "other images", "other images, later images", "question to images"]
    mean = dict.fromkeys([*shares, "own delimiters", "other delimiters"], 0.1)
    largest = {
        "over median": 5000.0,
        "dimension": 7,
        "token": "first token",
        "image tokens, over median": 9.0,
    }
    attention = {
        "prompts": 6, "images": 4, "mean of heads": mean, "heads": {"first token": [[0.6] * 9] * 3},
        "heads with more than half on the first token": 27, "heads by cross-image share": {"over 5%": 4},
        "layers": [mean | {"second sink": "delimiter", "largest activation": largest}] * 3,
    }  # fmt: skip
    kept = {"equal layers": {"64": {"in all, as scaled": 0.9}}}
    latent = {
        "numbers a token": 11520, "images": kept, "text": kept, "calibration tokens": 900,
        "replay": {"full": {"right": 0.9, "agreement": 1.0, "kl": 0.0}}, "replay, answer tokens": 70,
        "prompts": {"test": 8, "images": 4},
    }  # fmt: skip
    return card, attention, latent
