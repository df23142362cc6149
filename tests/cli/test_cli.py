from __future__ import annotations

import json
import subprocess
import sys

import pytest
from PIL import Image

from capsight.blindsight import Category, HeadMap
from capsight.cli import bench, demo, demo_sides
from capsight.cli.app import main
from capsight.cli.output import parse_bytes
from capsight.errors import OptionError
from capsight.kvcapsule import KVCapsule
from capsight.reference import load_reference_vlm


def run(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["capsight", *map(str, arguments)])
    code = 0
    try:
        main()
    except SystemExit as stop:
        code = stop.code or 0
    out = capsys.readouterr()
    return code, out.out, out.err


def test_demo_writes_table_json_and_picture(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(demo_sides, "ROUNDS", 1)
    code, out, _ = run(
        monkeypatch, capsys, "demo", "--no-compiled", "--images", 3, "--questions", 3,
        "--json", tmp_path / "demo.json", "--png", tmp_path / "demo.png",
    )  # fmt: skip
    assert code == 0
    assert "smaller" in out
    assert "compiled" not in out
    figures = json.loads((tmp_path / "demo.json").read_text())
    full, ours = figures["sides"].values()
    assert full["kv_bytes"] > figures["heads"]["kv_bytes"] > ours["kv_bytes"] > 0
    assert len(figures["heads"]["answers"]) == 3
    assert len(figures["questions"]) == len(full["answers"]) == 3
    for side in (full, ours, figures["heads"]):
        speed = {name: side[name] for name in ("tokens_per_s", "speed_ratio")}
        assert side["steps"] == {"eager": speed}
    assert full["speed_ratio"] == full["ttft_ratio"] == 1
    assert Image.open(tmp_path / "demo.png").width > 800


@pytest.mark.parametrize("decode", ["materialise", "latent"])
def test_all_sides_of_the_demo_decode_as_asked(monkeypatch, capsys, tmp_path, decode):
    def ask_sides(model, processor, item, asked, with_compiled, on_step):
        raise OptionError(str([side.decode for side in asked if side.capsule is not None]))

    monkeypatch.setattr(demo, "ask_sides", ask_sides)
    arguments = "--images", 1, "--questions", 1, "--decode", decode, "--png", tmp_path / "demo.png"
    _, _, err = run(monkeypatch, capsys, "demo", *arguments)
    assert str([decode] * 3) in " ".join(err.split())


def test_generate(monkeypatch, capsys, tmp_path):
    from capsight.reference import split_prompt

    prompt = split_prompt("calibration", 0, 1)
    prompt.scenes[0].image.save(tmp_path / "a.png")
    for protocol in ("within", "after"):
        code, out, err = run(
            monkeypatch, capsys, "generate", "--image", tmp_path / "a.png",
            "--prompt", prompt.questions[0].text, "--protocol", protocol, "--retained", 1.0,
        )  # fmt: skip
        assert code == 0
        assert out.strip()
        assert "KV cache" in err
    said = {}
    latent, rebuilt = ("--decode", "latent"), ("--decode", "materialise")
    heads = ("--capsule", "reference-heads")
    KVCapsule.from_pretrained("reference-heads").with_codec("adaptive").save_pretrained(tmp_path / "adaptive")
    adaptive = ("--capsule", tmp_path / "adaptive")
    for options in (
        ("--bits", 16), latent, rebuilt, ("--bits", 8), ("--bits", 4, *latent), adaptive, (*adaptive, *latent)
    ):  # fmt: skip
        code, _, err = run(
            monkeypatch, capsys, "generate", "--image", tmp_path / "a.png",
            "--prompt", prompt.questions[0].text, "--max-new-tokens", 1, *options,
            *(() if "--capsule" in options else heads),
        )  # fmt: skip
        assert code == 0
        said[options] = parse_bytes(err.split("KV cache ")[1].split(",")[0])
    assert said["--bits", 4, *latent] < said["--bits", 8] < said["--bits", 16]
    assert said["--bits", 16] == said[latent] == said[rebuilt]
    assert said[adaptive] < said[*adaptive, *latent]  # its weights are stored, too


def test_fit_then_inspect_then_eval(monkeypatch, capsys, tmp_path):
    folder = tmp_path / "capsule"
    code, out, _ = run(
        monkeypatch, capsys, "fit", "--out", folder, "--samples", 4, "--codec", "heads", "--retained", 0.5
    )  # fmt: skip
    assert code == 0
    assert "break-even" in out
    code, out, _ = run(monkeypatch, capsys, "inspect", folder, "--json", tmp_path / "i.json")
    assert code == 0
    facts = json.loads((tmp_path / "i.json").read_text())
    assert (facts["codec"], facts["retained"]) == ("heads", 0.5)
    code, out, _ = run(
        monkeypatch, capsys, "eval", "--capsule", folder, "--method", "heads-int8", "--method", "adaptive",
        "--retained", 0.5, "--images", "2", "--samples", 2, "--json", tmp_path / "e.json",
    )  # fmt: skip
    assert code == 0
    assert set(json.loads((tmp_path / "e.json").read_text())["methods"]) == {
        "full", "heads-int8 0.5", "adaptive 0.5"
    }  # fmt: skip
    assert not (tmp_path / "e.json.partial").exists()


def test_eval_by_task_with_a_head_map_goes_on_where_it_was(monkeypatch, capsys, tmp_path):
    HeadMap(((Category.SINK,) * 8,) * 8).save_pretrained(tmp_path / "map")
    asked = (
        "eval", "--method", "evict", "--method", "uniform", "--retained", 0.25, "--images", "2",
        "--capsule", "reference-heads", "--head-map", tmp_path / "map",
        "--tasks", "find,compare", "--max-new-tokens", 4,
    )  # fmt: skip
    out = ("--json", tmp_path / "e.json")
    code, text, _ = run(monkeypatch, capsys, *asked, "--samples", 4, *out)
    assert code == 0
    assert "full + head map" in text
    figures = json.loads((tmp_path / "e.json").read_text())
    assert list(figures["methods"]) == ["full", "full + head map", "evict 0.25", "uniform 0.25"]
    assert set(figures["methods"]["full"]["by"]["task"]) <= {"find", "compare"}
    assert [(row["method"], row["against"]) for row in figures["paired"]] == [("evict 0.25", "uniform 0.25")]
    (tmp_path / "e.json.partial").write_text('{"samples": 3}\n')
    code, _, err = run(monkeypatch, capsys, *asked, "--samples", 4, *out)
    assert code == 2
    assert "other settings" in err


def test_bench(monkeypatch, capsys, tmp_path):
    code, out, _ = run(
        monkeypatch, capsys, "bench", "--batch", "1,2", "--images", "1", "--new-tokens", 3, "--runs", 1,
        "--capsule", "reference-heads", "--retained", 0.25, "--threads", 1,
        "--kv-budget", "64MB", "--calibrate", 2,
        "--method", "heads", "--method", "adaptive", "--method", "adaptive-int4", "--method", "uniform",
        "--decode", "materialise", "--decode", "latent",
        "--json", tmp_path / "b.json",
    )  # fmt: skip
    assert code == 0
    assert "adaptive 0.25" in out
    assert "64MB" in out
    rows = json.loads((tmp_path / "b.json").read_text())["rows"]
    methods = ("heads", "adaptive", "adaptive-int4", "uniform")
    names = ["full", *(f"{method} 0.25{way}" for method in methods for way in ("", " latent"))]
    assert [(r["name"], r["batch"]) for r in rows] == [(name, batch) for batch in (1, 2) for name in names]
    assert all(r["ttft_s"] > 0 and r["tokens_per_s"] > 0 and r["encode_s"] > 0 for r in rows)
    assert rows[1]["largest_batch"] >= rows[0]["largest_batch"] > 0
    assert rows[0]["ratios"]["bytes"] == 1.0
    fits = json.loads((tmp_path / "b.json").read_text())["calibration"]
    assert [(f["method"], f["prompts"]) for f in fits] == [
        (name, 2) for name in ("heads", "adaptive", "adaptive-int4")
    ]
    held = {row["name"]: row["kv_bytes"] for row in rows[: len(names)]}
    assert held["heads 0.25"] == held["heads 0.25 latent"] < held["full"]
    assert held["adaptive-int4 0.25"] < held["adaptive 0.25"] < held["adaptive 0.25 latent"] < held["full"]


def test_bench_fits_what_another_model_has_no_file_of(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(bench, "load_model", lambda *_: load_reference_vlm())
    code, out, _ = run(
        monkeypatch, capsys, "bench", "--model", "another", "--method", "heads", "--method", "adaptive",
        "--method", "feature-pca", "--batch", 1, "--images", 1, "--new-tokens", 2, "--runs", 1,
        "--threads", 1,
    )  # fmt: skip
    assert code == 0
    assert "heads 0.4" in out
    assert "adaptive 0.4" in out
    assert "feature-pca 0.4" in out


def test_calibrate_then_attention(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("capsight.cli.calibrate.REFERENCE_IMAGES", (2,))  # short prompts
    folder = tmp_path / "map"
    code, out, _ = run(
        monkeypatch, capsys, "calibrate", "--out", folder, "--samples", 2, "--held-out", 2,
        "--unit", "layer", "--tolerance", 0.5,
    )  # fmt: skip
    assert code == 0
    assert "2 prompts voted, 2 were held out" in out
    assert Image.open(folder / "head_map.png").width > 100
    code, _, _ = run(
        monkeypatch, capsys, "attention", "--head-map", folder, "--head", "1,2", "--out", tmp_path / "a.png"
    )
    assert code == 0
    assert Image.open(tmp_path / "a.png").width > 100


def test_fit_on_a_folder_of_pictures(monkeypatch, capsys, tmp_path):
    (tmp_path / "data").mkdir()
    for shade in (10, 200):
        Image.linear_gradient("L").convert("RGB").resize((224, 224)).point(lambda p, s=shade: p ^ s).save(
            tmp_path / "data" / f"{shade}.png"
        )
    code, _, _ = run(monkeypatch, capsys, "fit", "--data", tmp_path / "data", "--out", tmp_path / "capsule")
    assert code == 0


def test_installed_command_has_help():
    out = subprocess.run(
        [sys.executable, "-m", "capsight.cli.app", "--help"], capture_output=True, text=True, check=True
    )
    for command in ("demo", "generate", "fit", "inspect", "eval", "bench", "calibrate", "attention"):
        assert command in out.stdout
