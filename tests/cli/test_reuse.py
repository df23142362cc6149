"""`capsight encapsulate` and `capsight ask`."""

from __future__ import annotations

import sys

import pytest

from capsight import CapsuleStore
from capsight.reference import split_prompt

from .test_cli import run


@pytest.fixture
def pictures(tmp_path):
    prompt = split_prompt("calibration", 0, 2)
    for index, scene in enumerate(prompt.scenes):
        scene.image.save(tmp_path / f"{index}.png")
    return prompt, [tmp_path / "0.png", tmp_path / "1.png"]


def test_ask_says_what_generate_says(monkeypatch, capsys, tmp_path, pictures):
    prompt, (first, second) = pictures
    file = tmp_path / "images.safetensors"
    images = ("--image", first, "--image", second)
    for options in ((), ("--capsule", "reference-heads", "--retained", 0.5, "--bits", 8)):
        code, out, _ = run(monkeypatch, capsys, "encapsulate", *images, "--out", file, *options)
        assert code == 0
        assert "2 images" in out
        code, table, _ = run(monkeypatch, capsys, "inspect", file)
        assert code == 0
        assert "heads-int8" in table if options else "joint" in table
        assert any("images" in line and "2" in line for line in table.splitlines())
        for question in prompt.questions[:2]:
            code, answer, err = run(monkeypatch, capsys, "ask", file, "--prompt", question.text, *options)
            assert code == 0
            assert "KV cache" in err
            if not options:
                code, direct, _ = run(
                    monkeypatch, capsys, "generate", *images, "--prompt", question.text, "--protocol", "after"
                )
                assert answer == direct
    code, _, err = run(monkeypatch, capsys, "ask", file, "--prompt", "what?")
    assert code == 2
    assert "another capsule (heads-int8, 0.5 retained" in err
    file.write_bytes(file.read_bytes()[:-1])
    for command in (("ask", file, "--prompt", "what?"), ("inspect", file)):
        code, _, err = run(monkeypatch, capsys, *command)
        assert code == 2
        assert "truncated" in err


def test_ask_at_rest(monkeypatch, capsys, tmp_path, pictures):
    prompt, (first, second) = pictures
    files = [tmp_path / "images", tmp_path / "rest"]
    for file, options in zip(files, ((), ("--quality", 0.98)), strict=True):
        images = ("--image", first, "--image", second)
        assert run(monkeypatch, capsys, "encapsulate", *images, "--out", file, *options)[0] == 0
    assert files[1].stat().st_size < files[0].stat().st_size / 5
    for question in prompt.questions[:2]:
        answers = [run(monkeypatch, capsys, "ask", file, "--prompt", question.text)[1] for file in files]
        assert answers[0] == answers[1]


def test_pictures_of_a_folder_are_opened_one_by_one(monkeypatch, capsys, tmp_path, pictures):
    """What was read before a damaged picture is kept; nobody has memory for a whole folder."""
    (tmp_path / "1.png").write_bytes(b"no picture")
    store = tmp_path / "store"
    code, _, err = run(monkeypatch, capsys, "encapsulate", tmp_path, "--store", store)
    assert code == 2
    assert "1.png" in err
    assert len(CapsuleStore(store).files()) == 1
    monkeypatch.setitem(sys.modules, "constriction", None)
    monkeypatch.setattr("capsight.cli.encapsulate.load_model", None)  # refused before anything is loaded
    for options in (("--store", store), ("--out", tmp_path / "x", "--quality", 0.9)):
        code, _, err = run(monkeypatch, capsys, "encapsulate", "--image", tmp_path / "0.png", *options)
        assert code == 2
        assert "capsight[rest]" in err


def test_ask_over_a_store(monkeypatch, capsys, tmp_path, pictures):
    prompt, (first, second) = pictures
    (tmp_path / "notes.txt").write_text("no picture")
    store = ("--store", tmp_path / "store")
    code, out, _ = run(monkeypatch, capsys, "encapsulate", tmp_path, *store, "--quality", 0.98)
    assert code == 0
    assert "2 images" in out
    assert "2 new" in out
    assert "0 new" in run(monkeypatch, capsys, "encapsulate", tmp_path, *store)[1]
    images = ("--image", first, "--image", second)
    for reuse in ("anywhere", "prefix"):
        asked = ("ask", *store, *images, "--prompt", prompt.questions[0].text, "--reuse", reuse)
        code, answer, _ = run(monkeypatch, capsys, *asked)
        assert code == 0
        assert answer.strip() == prompt.questions[0].answer
    code, out, _ = run(monkeypatch, capsys, "inspect", tmp_path / "store")
    assert code == 0
    assert "3 of 0.98" in out  # the second image is there by itself, and as it was read after the first
    file = tmp_path / "rest"
    assert run(monkeypatch, capsys, "encapsulate", *images, "--out", file, "--bytes", "9KB")[0] == 0
    assert 4000 < file.stat().st_size <= 9000
    assert run(monkeypatch, capsys, "encapsulate", *images, "--out", file, "--quality", 0.9)[0] == 0
    code, out, _ = run(monkeypatch, capsys, "inspect", file)
    assert code == 0
    assert "0.9" in out
    assert "read anew" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["encapsulate", "--image", "none.png"], "either --out"),
        (["encapsulate", ".", "--out", "x"], "--store"),
        (["encapsulate", ".", "--store", "x", "--bytes", "9KB"], "--bytes"),
        (["encapsulate", "--image", "x.png", "--out", "x", "--bytes", "many"], "amount of memory"),
        (["encapsulate", "none", "--store", "x"], "no folder"),
        (["encapsulate", ".", "--store", "x"], "no pictures"),
        (["ask", "--prompt", "x"], "either a file"),
        (["ask", "--store", "x", "--prompt", "x"], "--image"),
        (["ask", "--store", "x", "--image", "y.png", "--prompt", "x", "--reuse", "z"], "reuse"),
        (["encapsulate", "--image", "none.png", "--out", "x", "--quality", "1.5"], "quality"),
        (["encapsulate", "--image", "none.png", "--out", "x"], "none.png"),
        (["encapsulate", "--image", "none.png", "--out", "/no/such/folder/x"], "does not exist"),
        (["ask", "none.safetensors", "--prompt", "x"], "missing"),
        (["ask", "none.safetensors", "--prompt", "x", "--reuse", "prefix"], "--reuse"),
        (["ask", "none.safetensors", "--prompt", "x", "--bits", "3"], "8 or 4 bits"),
        (["ask", "none.safetensors", "--prompt", "x", "--max-new-tokens", "0"], "at least 1"),
    ],
)
def test_bad_input_is_one_clear_line(monkeypatch, capsys, tmp_path, arguments, words):
    monkeypatch.chdir(tmp_path)
    code, _, err = run(monkeypatch, capsys, *arguments)
    assert code == 2
    assert words in err
    assert len(err.strip().splitlines()) == 1
