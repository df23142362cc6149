"""What a newcomer meets first: pictures to try things on, hints, folders with other things in them."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from PIL import Image

from capsight.cli.fit import calibration_items
from capsight.evaluation import jsonl_items, reference_items
from capsight.reference.wording import is_task_question
from cli.test_cli import run

ROOT = Path(__file__).resolve().parents[2]


def test_examples_serve_the_other_commands(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    code, out, _ = run(monkeypatch, capsys, "examples", "--images", 2)
    assert code == 0
    assert "capsight generate" in out
    assert Image.open("examples/2.png").mode == "RGB"
    assert [len(item.images) for item in jsonl_items(Path("examples/questions.jsonl"))][:1] == [2]
    assert len(calibration_items("reference", Path("examples"), 9)) == 2


def test_commands_of_the_quick_start_name_pictures_that_are_there(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, capsys, "examples")[0] == 0
    text = (ROOT / "docs/quickstart.md").read_text()
    commands = [shlex.split(line, comments=True) for line in re.findall(r"^capsight .*$", text, re.M)]
    named = [word for command in commands for word in command if word.endswith(".png")]
    assert len(named) > 3
    assert all(Path(name).is_file() for name in named)


def test_a_question_outside_the_task_gets_a_hint(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    run(monkeypatch, capsys, "examples", "--images", 1)
    for prompt, hint in (("What is in this picture?", True), ("Image 1: what is the total?", False)):
        code, _, err = run(
            monkeypatch, capsys, "generate", "--image", "examples/1.png", "--prompt", prompt,
            "--max-new-tokens", 1,
        )  # fmt: skip
        assert code == 0
        assert ("knows questions such as" in " ".join(err.split())) == hint


@pytest.mark.parametrize("images", [1, 4, 8])
def test_questions_of_the_task_are_known(images):
    for item in reference_items("test", images, 8):
        for ask in item.asks:
            assert is_task_question(ask.question), ask.question


def test_other_things_in_a_folder_of_pictures(tmp_path):
    Image.new("RGB", (224, 224)).save(tmp_path / "a.PNG")
    (tmp_path / "._a.png").write_bytes(b"no picture")
    (tmp_path / "sub.png").mkdir()
    (tmp_path / "sub").mkdir()
    (tmp_path / "notes.txt").write_text("")
    (tmp_path / "broken.png").symlink_to(tmp_path / "none")
    assert [item.name for item in calibration_items("reference", tmp_path, 9)] == ["a.PNG"]
