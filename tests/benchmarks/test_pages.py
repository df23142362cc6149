"""The generated README part and pages, from small made-up files in the formats that the commands write."""

from __future__ import annotations

from pathlib import Path

import write_pages

from benchmarks.made_up import (
    MACHINE,
    accuracy,
    bench,
    decode,
    decode_amx,
    decode_joint,
    decode_model,
    decode_reference,
    demo,
    maps,
    peak_memory,
    prefill,
    tables_are_square,
    ttft,
    write,
)


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
        root,
        accuracy=accuracy(),
        bench=bench(),
        prefill=prefill(),
        prefill_longest=prefill(),
        demo=demo(),
        peak_memory=peak_memory(),
    )
    assert "old" not in readme
    assert readme.startswith("a\n<!-- summary: made -->\n<!-- /summary -->\n<!-- numbers: made -->\n")
    assert readme.endswith("<!-- /numbers -->\nb\n")
    assert "40 test questions of the reference task" in readme
    assert "2.00x smaller" in readme
    assert (
        "| the same with `heads` 0.4 | compiled 10 % faster, eager 20 % slower than the fastest full cache |"
    ) in readme
    assert (
        "compiled 20 % faster, eager 20 % slower than the fastest full cache in tokens/s, first token 25 % "
        "later than with `DynamicCache`, 45 % fewer bytes"
    ) in readme
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
    assert "| joint 0.05 | 9.0 MB | 7.0 MB | 0 B |" in speed
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
        decode_attention_amx=decode_amx(),
        decode_model=decode_model(),
        decode_joint=decode_joint(),
        decode_reference=decode_reference(),
        decode_reference_zen4=decode_reference(),
    )
    found = {path.stem: path.read_text() for path in (root / "docs" / "benchmarks").glob("*.md")}
    assert set(found) == {"bits", "head-maps", "decode"}
    assert "# Stored bits\n\nCapsules in the numbers" in found["bits"]
    assert "| tolerance | output, tolerance 2% | 50.0 | 50.0 | 95.0 | +1.0 | 98.0 |" in found["head-maps"]
    assert "| a VLM | calibrated | 700 | 8 | 250 ms | 1.50x | 50% | 10% |" in found["head-maps"]
    assert "| 8192 | 1 | float32 | 0.4 | 1.00 ms | 2.00 ms | 2.00x | 2.50x |" in found["decode"]
    assert "reads the full cache 1.5 to 1.5 times as fast" in found["decode"]
    assert "| 8192 | 1 | heads 0.4 | 7.50 | 25 % faster | equal | 44.0 MB |" in found["decode"]
    assert "medians of 3 runs of 8 steps" in found["decode"]
    assert "| 8192 | 8 | 512 | 2.00 ms | 4.00 ms | 50 % slower |" in found["decode"]
    assert found["decode"].count("| joint 0.05 | 8 | 12.50 | 25 % faster | 20 % faster to 30 % faster |") == 2
    assert all(tables_are_square(text) for text in found.values())


def test_again_is_the_same(root):
    first = write(root, accuracy=accuracy())
    assert write(root, accuracy=accuracy()) == first


def test_what_is_missing_is_left_out(root):
    readme = write(root, demo=demo())
    assert "test questions" not in readme
    assert "make demo" in readme
    assert not (root / "docs" / "benchmarks" / "accuracy.md").exists()
    assert "<!-- /numbers -->" in write(root)


def test_every_script_and_result_is_in_the_list_of_benchmarks():
    folder = Path(write_pages.__file__).parent
    listed = (folder / "README.md").read_text()
    scripts = [path.name for path in folder.glob("*.py") if "__main__" in path.read_text()]
    results = [path.name for path in (folder / "results").glob("*.json")]
    assert [name for name in (*scripts, *results) if name not in listed] == []
    assert len(scripts) > 20
