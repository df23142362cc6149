"""Names, answers and options that look like markup or that no encoding has are printed as they are."""

from __future__ import annotations

import json

import pytest

from capsight.reference import split_prompt
from cli.test_cli import run

NASTY = "a[/x][bold]:smile:"


@pytest.fixture
def pictures(tmp_path):
    """Two pictures of the reference task in a folder whose name is rich markup."""
    folder = tmp_path / NASTY
    folder.mkdir(parents=True)
    prompt = split_prompt("calibration", 0, 2)
    for number, scene in enumerate(prompt.scenes):
        scene.image.save(folder / f"{number}.png")
    return folder


def questions(folder, **more):
    path = folder / "q.jsonl"
    row = {"images": ["0.png"], "question": "Image 1: what is the total?", "answer": "x"}
    path.write_text(json.dumps(row | more) + "\n")
    return path


def test_names_with_markup_are_printed_as_they_are(monkeypatch, capsys, tmp_path, pictures):
    monkeypatch.setenv("COLUMNS", "400")
    out = pictures / "out"
    image = ("--image", pictures / "0.png")
    short = ("--max-new-tokens", 2)
    code, said, _ = run(monkeypatch, capsys, "encapsulate", *image, "--out", f"{out}.safetensors")
    assert code == 0
    assert f"{out}.safetensors" in said
    code, _, _ = run(monkeypatch, capsys, "ask", f"{out}.safetensors", "--prompt", "[/x]", *short)
    assert code == 0
    code, _, _ = run(monkeypatch, capsys, "generate", *image, "--prompt", "[/x] [bold]", *short)
    assert code == 0
    code, said, _ = run(monkeypatch, capsys, "fit", "--data", pictures, "--out", out)
    assert code == 0
    assert str(out) in said
    code, said, _ = run(monkeypatch, capsys, "inspect", out)
    assert code == 0
    assert NASTY in said
    data = questions(pictures, task="[/x] task", answer="[/x]")
    code, said, _ = run(
        monkeypatch, capsys, "eval", "--data", data, "--capsule", out, "--method", "joint", *short
    )
    assert code == 0
    assert "[/x] task" in said
    for arguments in (
        ["generate", "--prompt", "x", "--image", pictures / "none.png"],
        ["generate", "--prompt", "x", "--model", pictures / NASTY, "--capsule", "reference"],
        ["inspect", pictures / NASTY],
        ["generate", "--prompt", "x", "--capsule", pictures / NASTY],
        ["ask", pictures / NASTY, "--prompt", "x"],
        ["eval", "--data", pictures / NASTY], ["fit", "--out", "x", "--data", pictures / NASTY],
        ["eval", "--tasks", NASTY], ["eval", "--images", NASTY],
        ["generate", "--prompt", "x", "--device", NASTY],
        ["generate", "--prompt", "x", "--dtype", NASTY], ["plan", "--model", pictures / NASTY],
        ["report", "--eval", pictures / NASTY], ["attention", "--head-map", pictures / NASTY],
        ["generate", "--prompt", "x", "--processor", f"{NASTY}:x"],
        ["demo", "--json", pictures / "x" / NASTY],
    ):  # fmt: skip
        code, _, err = run(monkeypatch, capsys, *arguments)
        assert code == 2, arguments
        assert NASTY in err, arguments
        assert len(err.strip().splitlines()) == 1, arguments


def test_a_markup_option_value_that_is_no_number(monkeypatch, capsys):
    code, _, err = run(monkeypatch, capsys, "eval", "--samples", "[/x]")
    assert code == 2
    assert "Traceback" not in err


def test_names_that_no_encoding_has(monkeypatch, capsys, tmp_path):
    code, _, err = run(monkeypatch, capsys, "generate", "--prompt", "x", "--image", tmp_path / "\udcff\n.png")
    assert code == 2
    assert len(err.strip().splitlines()) == 1


def test_answers_in_the_demo_are_no_markup(monkeypatch, capsys, tmp_path):
    from capsight.cli.demo_tables import print_demo
    from capsight.cli.output import console
    from capsight.evaluation import Ask, Item
    from capsight.evaluation.cache_bytes import CacheBytes

    class Nothing:
        def __getattr__(self, name):
            return 1 if name in ("nbytes", "ttft_s", "tokens_per_s", "attention", "linear") else Nothing()

    class Side:
        name, module_nbytes, compiled, eager, flops = "full [/x]", 0, None, Nothing(), Nothing()

        class answers:  # noqa: N801
            texts, nbytes = ("[/x]",), CacheBytes(5, 5, 0)

    print_demo(console(), Item("a", (), (Ask("[/q]", "[/a]"),)), [Side()])
    out = capsys.readouterr().out
    assert all(text in out for text in ("[/x]", "[/q]", "[/a]", "full [/x]"))


def test_a_device_that_is_none_is_refused_in_a_line(monkeypatch, capsys):
    for name in ("nonsense", "meta", "cuda:99", "cpu:x"):
        for command in (["generate", "--prompt", "x"], ["eval"], ["bench"], ["fit", "--out", "/tmp/never"]):
            code, _, err = run(monkeypatch, capsys, *command, "--device", name)
            assert code == 2
            assert name in err
            assert len(err.strip().splitlines()) == 1
