"""Malformed files: one clear error each; and what the commands write today is read."""

from __future__ import annotations

import json
import sys

import pytest

from capsight.cli.app import main
from capsight.errors import CapsuleFileError
from capsight.evaluation import FULL, MethodResult, Outcome, summary
from capsight.report import BenchFile, DemoFile, EvalFile, LayerErrors, read, read_picture
from report import samples

READERS = {
    "eval": (EvalFile, samples.eval_json),
    "bench": (BenchFile, samples.bench_json),
    "demo": (DemoFile, samples.demo_json),
    "errors": (LayerErrors, samples.errors_json),
}


def changed(values, *path, to):
    inner = values
    for key in path[:-1]:
        inner = inner[key]
    if to is ...:
        del inner[path[-1]]
    else:
        inner[path[-1]] = to
    return values


@pytest.mark.parametrize(
    ("name", "path", "to", "words"),
    [
        ("eval", ["methods"], [], "methods is"),
        ("eval", ["methods", "full"], ..., "no method 'full'"),
        ("eval", ["methods", "full", "kl"], ..., "methods.full.kl is missing"),
        ("eval", ["methods", "full", "exact_match"], "95", "expected a valid number"),
        ("eval", ["methods", "full", "drop"], float("nan"), "expected a finite number"),
        ("eval", ["methods", "full", "interval"], [2, 1], "ascending"),
        ("eval", ["methods", "full", "kv_bytes_full"], 0, "kv_bytes_full is 0"),
        ("eval", ["methods", "full", "questions"], 0, "questions is 0"),
        ("eval", ["methods", "full", "by", "task"], 3, "by.task is 3"),
        ("eval", ["machine"], ..., "machine is missing"),
        ("bench", ["rows"], [], "rows is"),
        ("bench", ["rows", 0, "batch"], 0, r"rows\[0\].batch is 0"),
        ("bench", ["rows", 1, "ttft_s"], -1, "greater than 0"),
        ("bench", ["rows", 0, "kv_bytes"], 1.5, "expected a valid integer"),
        ("demo", ["sides", "full cache"], ..., "sides is"),
        ("demo", ["sides", "full cache", "answers"], ["one"], "for each of the 2"),
        ("demo", ["sides", "capsules, 40% retained", "steps", "eager", "tokens_per_s"], 0, "greater than 0"),
        ("bench", ["rows", 0, "decode"], 3, "expected a valid string"),
        ("demo", ["questions", 0, "answer"], 4, "expected a valid string"),
        ("errors", ["layers"], [], "layers is"),
        ("errors", ["layers", 0, "keys"], None, "keys is missing"),
    ],
)
def test_malformed(tmp_path, name, path, to, words):
    kind, make = READERS[name]
    with pytest.raises(CapsuleFileError, match=words) as error:
        read(kind, samples.write(tmp_path, name, changed(make(), *path, to=to)))
    assert f"{name}.json" in str(error.value)
    assert "write it again with" in str(error.value)


@pytest.mark.parametrize("name", list(READERS))
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"3", b"\xff\xfe", b"{}"])
def test_not_a_file_of_ours(tmp_path, name, content):
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(CapsuleFileError, match=r"x\.json"):
        read(READERS[name][0], path)
    with pytest.raises(CapsuleFileError, match="cannot read"):
        read(READERS[name][0], tmp_path / "none.json")


def test_pictures_of_others_are_refused(tmp_path):
    assert read_picture(samples.picture(tmp_path)).heads[0] == "layer 1, head 2 (sink)"
    for content in (b"", b"GIF89a", samples.picture(tmp_path).read_bytes()[:80]):
        (tmp_path / "x.png").write_bytes(content)
        with pytest.raises(CapsuleFileError, match=r"x\.png"):
            read_picture(tmp_path / "x.png")
    with pytest.raises(CapsuleFileError, match="no picture of `capsight attention`"):
        read_picture(samples.picture(tmp_path, "holiday"))
    with pytest.raises(CapsuleFileError, match="cannot read"):
        read_picture(tmp_path / "none.png")


def test_reads_what_eval_writes(tmp_path):
    outcomes = [Outcome("a", "plate", 2, right, True, 0.1) for right in (True, False)]
    results = {name: MethodResult(list(outcomes), 100, 200) for name in (FULL, "heads 0.4")}
    values = {"model": "m", "protocol": "after", "methods": summary(results), "machine": {}}
    found = read(EvalFile, samples.write(tmp_path, "e", values))
    assert [row.name for row in found.rows] == [FULL, "heads 0.4"]
    assert (found.rows[1].method, found.rows[1].retained) == ("heads", 0.4)
    assert found.full.by["images"]["2"].questions == 2


def test_command_line(monkeypatch, capsys, tmp_path):
    evaluation = samples.write(tmp_path, "e", samples.eval_json())
    out = tmp_path / "report.html"
    arguments = ["report", "--eval", evaluation, "--capsule", "reference", "--out", out]
    monkeypatch.setattr(sys, "argv", ["capsight", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code
    assert "Layer budgets" in out.read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "nothing to report"),
        (["--eval", "none.json"], "none.json"),
        (["--eval", "demo.json"], "write it again"),
        (["--demo", "demo.json", "--out", "/no/such/x.html"], "does not exist"),
        (["--demo", "demo.json", "--head-map", "none.json"], "none.json"),
    ],
)
def test_bad_input_is_one_clear_line(monkeypatch, capsys, tmp_path, arguments, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo.json").write_text(json.dumps(samples.demo_json()))
    monkeypatch.setattr(sys, "argv", ["capsight", "report", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert words in err
    assert len(err.strip().splitlines()) == 1
