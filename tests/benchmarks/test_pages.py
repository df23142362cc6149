"""The generated README part and pages, from small made-up files in the formats that the commands write."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
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
    rows = [
        r.to_dict() | {"name": r.name, "ratios": r.ratios(full), "largest_batch": 7} for r in (full, ours)
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
    ours = side | {
        "kv_bytes": 40,
        "module_bytes": 10,
        "latent": side | {"kv_bytes": 70, "tokens_per_s": 12.0},
    }
    return {"sides": {"full cache": side, "capsules": ours}}


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


def decode_joint():
    row = {"tokens": 8192, "batch": 8, "rank": 512, "code": "AVX2", "repeats": 5, "speedup": 0.5}
    row |= {"seconds": {"sdpa, grouped": 0.002, "joint": 0.004}}
    return decode() | {"rows": [row]}


def decode_reference():
    row = {"cache": "joint 0.05", "batch": 8, "ms_a_token": 12.5, "speed": 1.25}
    return {"machine": decode()["machine"], "rows": [row]}


@pytest.fixture
def root(tmp_path):
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    (tmp_path / "README.md").write_text(
        "a\n<!-- summary: made -->\nold\n<!-- /summary -->\n"
        "<!-- numbers: made -->\nold\n<!-- /numbers -->\nb\n"
    )
    return tmp_path


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


def test_what_making_capsules_takes(root):
    row = {"model": "a model", "batch": 8, "tokens": 931, "runs": 7, "added": 0.01997}
    row |= {"first_token_s": 2.6905, "full_s": 0.0075, "capsules_s": 0.0612}
    write(root, encode_cost={"machine": MACHINE, "rows": [row]})
    page = (root / "docs" / "benchmarks" / "speed.md").read_text()
    assert "| a model | 8 | 931 | 2690.5 ms | 7.5 ms | 61.2 ms | 2.0 % |" in page
    assert tables_are_square(page)


def test_more_prompts_have_a_page_of_their_own(root):
    readme = write(root, accuracy_more=accuracy())
    page = (root / "docs" / "benchmarks" / "accuracy-more.md").read_text()
    assert page.count("# More prompts") == 1
    assert "`make accuracy-more` makes this page" in page
    assert "| `heads` | 97.5 (-2.5) | 75.0 (-25.0) |" in page
    assert "97.5" not in readme
    assert "(docs/benchmarks/accuracy-more.md)" in write(root, accuracy=accuracy())
    assert tables_are_square(page)


def test_the_summary_names_the_best_other_method_and_the_smallest_cache(root):
    bits = accuracy(close=40) | {"dtype": "bfloat16"}
    default = dict(bits["methods"]["close 0.1"], kv_bytes=400, exact_match=97.5, drop=2.5)
    bits["methods"]["joint 0.05"] = default
    readme = write(root, accuracy=accuracy(joint=30, uniform=4, cur=24, snapkv=12), bits=bits)
    assert (
        "- The default, `joint 0.05`, answers **97.5 %** of 40 test questions right, the full cache 100.0 %."
        " The bfloat16 KV cache is **2.5 times smaller**, text included; modules, 77.0 KB once per model,"
        " are not counted."
    ) in readme
    assert (
        "- The smallest cache that loses no more than 1 point is 3.6 times smaller (`close 0.1`, 100.0 %)."
    ) in readme
    assert (
        "- At 0.1 `joint` has 75.0 %, the best other method of no fewer bytes (`cur`) 60.0 %, a uniform"
        " choice of tokens 10.0 %."
    ) in readme


def test_everything(root):
    readme = write(
        root, accuracy=accuracy(), bench=bench(), prefill=prefill(), prefill_longest=prefill(), demo=demo()
    )
    assert "old" not in readme
    assert readme.startswith("a\n<!-- summary: made -->\n<!-- /summary -->\n<!-- numbers: made -->\n")
    assert readme.endswith("<!-- /numbers -->\nb\n")
    assert "40 test questions of the reference task" in readme
    assert "2.00x smaller" in readme
    assert "20 % slower than `DynamicCache` in tokens/s, first token 25 % later, 45 % fewer bytes" in readme
    page = (root / "docs" / "benchmarks" / "accuracy.md").read_text()
    assert "| full cache | 100.0 | 100.0 |" in page
    assert "| `heads` | 97.5 (-2.5) | 75.0 (-25.0) |" in page
    assert "`quanto-int4` 95.0 (-5.0) at 17 % of the bytes" in page
    assert "| `heads 0.2` | `evict 0.2` | +25.0 |" in page
    assert "77.0 KB" in page
    assert "| questions | 20 | 20 |" in page
    speed = (root / "docs" / "benchmarks" / "speed.md").read_text()
    assert "| `heads 0.4` | 4 | 2 | 250 ms (1.25) | 10.0 ms |" in speed
    assert "largest batch in 64.0 MB" in speed
    assert "3.00x" in speed
    assert all(tables_are_square(text) for text in (readme, page, speed))


def test_pages_of_what_is_run_by_hand(root):
    curve = maps(tolerance=0.02)
    write(
        root,
        bits=accuracy(),
        head_map_curve=curve,
        sink_choice=maps(),
        ttft=ttft(),
        decode_attention=decode(),
        decode_model=decode_model(),
        decode_joint=decode_joint(),
        decode_reference=decode_reference(),
    )
    found = {path.stem: path.read_text() for path in (root / "docs" / "benchmarks").glob("*.md")}
    assert set(found) == {"bits", "head-maps", "decode"}
    assert "# Stored bits\n\nCapsules in the numbers" in found["bits"]
    assert "| tolerance | output, tolerance 2% | 50.0 | 50.0 | 95.0 | +1.0 | 98.0 |" in found["head-maps"]
    assert "| a VLM | calibrated | 700 | 8 | 250 ms | 1.50x | 50% | 10% |" in found["head-maps"]
    assert "| 8192 | 1 | float32 | 0.4 | 1.00 ms | 2.00 ms | 2.00x | 2.50x |" in found["decode"]
    assert "| 8192 | 1 | heads 0.4 | 7.50 | 25 % faster | equal | 44.0 MB |" in found["decode"]
    assert "medians of 3 runs of 8 steps" in found["decode"]
    assert "| 8192 | 8 | 512 | 2.00 ms | 4.00 ms | 50 % slower |" in found["decode"]
    assert "| joint 0.05 | 8 | 12.50 | 25 % faster |" in found["decode"]
    assert all(tables_are_square(text) for text in found.values())


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


def test_page_of_the_judge_with_a_pretrained_language_model(root):
    card, attention, latent = smol()
    folder = root / "tools" / "judging" / "weights" / "smol"
    folder.mkdir(parents=True)
    (folder / "card.json").write_text(json.dumps(card))
    write(root, smol_attention=attention, smol_latent=latent, smol_head_maps=maps())
    page = (root / "docs" / "benchmarks" / "smol.md").read_text()
    assert "75.0 % at 1, 75.0 % at 4" in page
    assert "| 4 images | 50 (2) | 100 (2) |" in page
    assert "| 300 | 3000 | 75 | 100 |" in page
    assert "more than half of it in 27 of 27 heads" in page
    assert "5,000 times the median" in page
    assert "| 64 | 90.0 | 90.0 |" in page
    assert "| full | 90.0 | 100.0 | 0.0000 |" in page
    assert tables_are_square(page)


def test_page_of_the_judge_of_head_maps(root):
    card, *_ = smol()
    folder = root / "tools" / "judging" / "weights" / "smol"
    folder.mkdir(parents=True)
    (folder / "card.json").write_text(json.dumps(card))
    repeats = {
        "right, by images and kind": {"4": {"twice": "3/4", "photo": "1/2"}, "8": {"twice": "2/4"}},
        "right, images apart, by images and kind": {"4": {"twice": "1/4", "photo": "1/2"}, "8": {}},
        "test prompts of each": 4,
        "curve": [
            {"step": 10, "tokens": 100, "train": {"probe, new": 0.5}},
            {"step": 20, "tokens": 200, "train": {"probe, new": 0.9, "twice": 0.7}},
        ],
    }
    (folder / "repeats.json").write_text(json.dumps(repeats))
    curve = maps()
    control = {"group": "control", "name": "all sink", "drop": 12.0, "drop_interval": [7.5, 16.0]}
    equal = [{"group": "equal FLOPs", "name": n, "drop": d} for n, d in (("output", 0.5), ("random 0", 9.0))]
    curve["rows"] += [curve["rows"][0] | facts for facts in (control, *equal)]
    curve["rows"][0] |= {"group": "dense"}
    write(root, smol_repeats_head_maps=curve)
    page = (root / "docs" / "benchmarks" / "smol.md").read_text()
    assert "| 4 images, apart | 25 (4) | 50 (2) |" in page
    assert "| 8 images, apart |  |  |" in page
    assert "| 20 | 200 | 90 | 70 |" in page
    assert "The worst control, all sink, costs 12.0 points (95 % interval 7.5 to 16.0); at equal" in page
    assert "the calibrated map costs 0.5, random ones 9.0 to 9.0" in page
    assert "| 95.0 | +12.0 (+7.5 to +16.0) | 98.0 |" in page
    assert tables_are_square(page)


def test_again_is_the_same(root):
    first = write(root, accuracy=accuracy())
    assert write(root, accuracy=accuracy()) == first


def test_what_is_missing_is_left_out(root):
    readme = write(root, demo=demo())
    assert "test questions" not in readme
    assert "make demo" in readme
    assert not (root / "docs" / "benchmarks" / "accuracy.md").exists()
    assert "<!-- /numbers -->" in write(root)
