"""Where commands write: checked first, whole or not at all, names as they are."""

from __future__ import annotations

import json
import os
import shutil
import stat

import pytest
from PIL import Image

from capsight.blindsight import Category, HeadMap
from capsight.cli import demo as demo_module
from capsight.cli import evaluate as evaluate_module
from capsight.cli.target import check_folder, check_out, write
from capsight.errors import OptionError
from capsight.files import replace_file
from capsight.kvcapsule import KVCapsule
from cli.test_cli import run


def test_write_is_whole_or_nothing(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write(path, b"one")
    assert path.read_bytes() == b"one"
    (tmp_path / "link").symlink_to(path)
    write(tmp_path / "link", b"two")
    assert (tmp_path / "link").is_symlink()
    assert path.read_bytes() == b"two"

    def fails(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(OptionError, match="No space left"):
        write(path, b"three")
    assert path.read_bytes() == b"two"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.json", "link"]


def test_devices_and_pipes_are_written_into(tmp_path):
    check_out(tmp_path / "null")
    (tmp_path / "null").symlink_to(os.devnull)
    check_out(tmp_path / "null")
    write(tmp_path / "null", b"x")
    assert stat.S_ISCHR(os.stat(os.devnull).st_mode)
    with pytest.raises(OptionError, match=r"cannot write /dev/full: No space"):
        write(demo_module.Path("/dev/full"), b"x" * 100_000)


def test_devices_and_pipes_are_not_replaced(tmp_path, monkeypatch, capsys):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="device or a pipe"):
        replace_file(tmp_path / "pipe", b"x")
    Image.new("RGB", (56, 56)).save(tmp_path / "a.png")
    for out in (tmp_path / "pipe", "-"):
        code, _, err = run(monkeypatch, capsys, "encapsulate", "--image", tmp_path / "a.png", "--out", out)
        assert code == 2
        assert "keeps nothing" in err
    assert stat.S_ISFIFO(os.stat(tmp_path / "pipe").st_mode)
    ends = os.pipe()
    check_out(demo_module.Path(f"/dev/fd/{ends[1]}"))  # as a shell names the end of a pipe
    write(demo_module.Path(f"/dev/fd/{ends[1]}"), b"x")
    assert os.read(ends[0], 9) == b"x"
    for end in ends:
        os.close(end)


def test_eval_writes_into_devices(tmp_path, monkeypatch, capsys):
    few = ("eval", "--images", "1", "--samples", 1, "--max-new-tokens", 2)
    (tmp_path / "null").symlink_to(os.devnull)
    assert run(monkeypatch, capsys, *few, "--json", tmp_path / "null")[0] == 0
    assert run(monkeypatch, capsys, *few, "--json", "/dev/full")[0] == 2
    assert [path.name for path in tmp_path.iterdir()] == ["null"]
    assert not os.path.exists("/dev/full.partial")


@pytest.mark.parametrize("check", [check_out, check_folder])
def test_what_cannot_be_written_is_refused(tmp_path, check):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "a", tmp_path / ("x" * 300), tmp_path / "a\0b"):
        with pytest.raises(OptionError):
            check(path)
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    with pytest.raises(OptionError):
        check(loop / "a")
    with pytest.raises(OptionError, match="/proc/a"):
        check(demo_module.Path("/proc/a"))
    if check is check_out:
        with pytest.raises(OptionError, match="folder; name a file"):
            check(tmp_path)
        with pytest.raises(OptionError, match="does not exist"):
            check(tmp_path / "none" / "a")
        check(None)
        check(demo_module.Path("-"))
    else:
        with pytest.raises(OptionError, match="is a file"):
            check(tmp_path / "file")
        check(tmp_path / "made" / "later")
        assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["demo", "--json"], ["demo", "--png"], ["bench", "--json"], ["eval", "--json"], ["plan", "--json"],
        ["inspect", "reference", "--json"], ["report", "--out"], ["fit", "--out"], ["calibrate", "--out"],
        ["attention", "--head-map", "reference", "--out"], ["encapsulate", "--image", "a.png", "--out"],
        ["check-model", "reference", "--json"], ["examples"],
    ],
)  # fmt: skip
def test_every_command_refuses_before_the_work(monkeypatch, capsys, tmp_path, arguments):
    Image.new("RGB", (56, 56)).save(tmp_path / "a.png")
    monkeypatch.chdir(tmp_path)
    for module in ("demo", "bench", "evaluate", "fit", "calibrate", "attention", "encapsulate"):
        monkeypatch.setattr(f"capsight.cli.{module}.load_model", lambda *_: pytest.fail("the work began"))
    (tmp_path / "file").write_text("")
    code, _, err = run(monkeypatch, capsys, *arguments, tmp_path / "file" / "out")
    assert code == 2
    assert len(err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["plan"], ["inspect", "reference"],
        ["eval", "--images", "1", "--samples", 1, "--max-new-tokens", 2],
        ["bench", "--images", "1", "--batch", "1", "--new-tokens", 2, "--runs", 1, "--threads", 1],
        ["demo", "--no-compiled", "--images", 1, "--questions", 1],
    ],
)  # fmt: skip
def test_json_on_the_standard_output(monkeypatch, capsys, tmp_path, arguments):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(monkeypatch, capsys, *arguments, "--json", "-")
    assert code == 0
    assert "machine" in json.loads(out)
    assert err.strip()
    assert not (tmp_path / "-").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["demo", "--json", "a.png", "--png", "a.png"], ["demo", "--json", "-", "--png", "-"],
        ["eval", "--data", "a.png", "--json", "link"], ["inspect", "a.png", "--json", "./a.png"],
        ["report", "--eval", "a.png", "--out", "a.png"],
        ["encapsulate", "--image", "a.png", "--out", "a.png"],
        ["attention", "--head-map", "reference", "--image", "a.png", "--out", "link"],
    ],
)  # fmt: skip
def test_nothing_is_written_over_what_is_read(monkeypatch, capsys, tmp_path, arguments):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (56, 56)).save("a.png")
    (tmp_path / "link").symlink_to("a.png")
    before = (tmp_path / "a.png").read_bytes()
    code, _, err = run(monkeypatch, capsys, *arguments)
    assert code == 2
    assert "is named twice" in err
    assert (tmp_path / "a.png").read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (["fit", "--out"], "capsule.json"), (["calibrate", "--out"], "head_map.json"),
        (["calibrate", "--out"], "head_map.png"), (["examples"], "2.png"), (["examples"], "questions.jsonl"),
    ],
)  # fmt: skip
def test_a_folder_where_a_file_is_to_be(monkeypatch, capsys, tmp_path, arguments, name):
    for module in ("fit", "calibrate"):
        monkeypatch.setattr(f"capsight.cli.{module}.load_model", lambda *_: pytest.fail("the work began"))
    (tmp_path / "out" / name).mkdir(parents=True)
    code, _, err = run(monkeypatch, capsys, *arguments, tmp_path / "out")
    assert code == 2
    assert f"{name} is a folder" in err.replace("\n", "")
    assert [path.name for path in (tmp_path / "out").iterdir()] == [name]


@pytest.mark.parametrize(
    "arguments",
    [
        ["eval", "--images", "1", "--samples", 1, "--max-new-tokens", 2],
        ["bench", "--images", "1", "--batch", "1", "--new-tokens", 2, "--runs", 1, "--threads", 1],
        ["demo", "--no-compiled", "--images", 1, "--questions", 1],
    ],
)  # fmt: skip
def test_tables_are_printed_where_the_figures_cannot_be_written(monkeypatch, capsys, tmp_path, arguments):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(monkeypatch, capsys, *arguments, "--json", "/dev/full")
    assert code == 2
    assert "No space left" in err
    assert "full" in out


def test_an_interrupted_eval_goes_on_with_the_same_pictures_alone(monkeypatch, capsys, tmp_path):
    def stopped(*_):
        raise KeyboardInterrupt

    Image.new("RGB", (56, 56)).save(tmp_path / "a.png")
    (tmp_path / "q.jsonl").write_text('{"images": ["a.png"], "question": "how many?", "answer": "1"}\n')
    asked = ("eval", "--data", tmp_path / "q.jsonl", "--max-new-tokens", 2, "--json", tmp_path / "e.json")
    with monkeypatch.context() as patch:
        patch.setattr(evaluate_module, "summary", stopped)
        assert run(monkeypatch, capsys, *asked)[0] == 130
    Image.new("RGB", (56, 56), "red").save(tmp_path / "a.png")
    code, _, err = run(monkeypatch, capsys, *asked)
    assert (code, "other settings (pictures)" in err) == (2, True)


def test_json_is_there_before_the_tables(monkeypatch, capsys, tmp_path):
    def fails(*_):
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(evaluate_module, "print_report", fails)
    out = tmp_path / "e.json"
    run(monkeypatch, capsys, "eval", "--images", "1", "--samples", 1, "--max-new-tokens", 2, "--json", out)
    assert json.loads(out.read_text())["methods"]
    assert not (tmp_path / "e.json.partial").exists()


def test_an_interrupted_eval_goes_on_with_the_same_capsule_and_head_map_alone(monkeypatch, capsys, tmp_path):
    def stopped(*_):
        raise KeyboardInterrupt

    capsule, heads = KVCapsule.from_pretrained("reference-heads"), HeadMap.from_pretrained("reference")
    capsule.save_pretrained(tmp_path / "c")
    heads.save_pretrained(tmp_path / "m")
    asked = (
        *("eval", "--images", "1", "--samples", 1, "--max-new-tokens", 2, "--method", "heads"),
        *("--capsule", tmp_path / "c", "--head-map", tmp_path / "m", "--json", tmp_path / "e.json"),
    )
    with monkeypatch.context() as patch:
        patch.setattr(evaluate_module, "summary", stopped)
        assert run(monkeypatch, capsys, *asked)[0] == 130
    next(iter(capsule.codecs.values())).mean += 0.5
    for thing, folder, name in (
        (capsule, "c", "learnt"),
        (heads.replaced({(0, 0): Category.DENSE}), "m", "head_map_sha256"),
    ):
        shutil.copytree(tmp_path / folder, tmp_path / "kept")
        thing.save_pretrained(tmp_path / folder)
        code, _, err = run(monkeypatch, capsys, *asked)
        assert (code, f"other settings ({name})" in err) == (2, True)
        shutil.rmtree(tmp_path / folder)
        (tmp_path / "kept").rename(tmp_path / folder)
    code, _, err = run(monkeypatch, capsys, *asked)
    assert (code, "going on after 1 prompts" in err) == (0, True)
