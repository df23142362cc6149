"""`capsight plan` on the command line."""

from __future__ import annotations

import json
import sys

import pytest

from capsight.cli.app import main
from capsight.cli.plan import parse_bytes
from capsight.errors import OptionError
from tiny import FAMILIES


def run(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["capsight", "plan", *map(str, arguments)])
    code = 0
    try:
        main()
    except SystemExit as stop:
        code = stop.code or 0
    out = capsys.readouterr()
    return code, out.out, out.err


def test_table_and_json(monkeypatch, capsys, tmp_path):
    code, out, _ = run(
        monkeypatch, capsys, "--images", 4, "--images", 2, "--image-size", "448x224", "--image-size",
        "56x56", "--dense-share", 0.5, "--json", tmp_path / "plan.json",
    )  # fmt: skip
    assert code == 0
    for words in ("KV per request", "requests in", "break-even", "head map", "% less"):
        assert words in out
    figures = json.loads((tmp_path / "plan.json").read_text())
    assert figures["vision_tokens"] == 4 * 128 + 2 * 4
    assert figures["capsule_tokens"] == 4 * 128 + 2 * 4
    assert figures["sparse"]["total"] < figures["dense"]["total"]
    assert figures["machine"]["torch"]


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_every_family_from_a_config_file(monkeypatch, capsys, tmp_path, name):
    FAMILIES[name]().config.save_pretrained(tmp_path)
    for source in (tmp_path, tmp_path / "config.json"):
        code, out, err = run(
            monkeypatch,
            capsys,
            "--model",
            source,
            "--images",
            2,
            "--image-tokens",
            64,
            "--retained",
            0.4,
            "--gpu-memory",
            "1GiB",
        )
        assert (code, err) == (0, "")
        assert "2 images" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "/no/such"], "/no/such"),
        (["--model", __file__], "JSON"),
        (["--gpu-memory", "80"], "80GB"),
        (["--image-size", "4"], "WIDTHxHEIGHT"), (["--image-size", "4020x20"], "200 : 1"),
        (["--image-size", "4x4", "--image-tokens", "4"], "not both"),
        (["--images", "1", "--images", "2", "--image-tokens", "4", "--image-tokens", "5",
          "--image-tokens", "6"], "one kind per"),
        (["--images", "-1"], "0 or more"),
        (["--images", "0", "--text-tokens", "0"], "text or images"),
        (["--dtype", "int3"], "int3"),
        (["--retained", "2"], "retained"),
        (["--dense-share", "2"], "dense share"),
        (["--dense-share", "0.5", "--head-map", "x.json"], "not both"),
        (["--head-map", "/no/such.json"], "/no/such.json"),
        (["--json", "/no/such/x.json"], "does not exist"),
    ],
)  # fmt: skip
def test_bad_input_is_one_clear_line(monkeypatch, capsys, tmp_path, arguments, words):
    monkeypatch.chdir(tmp_path)
    code, _, err = run(monkeypatch, capsys, *arguments)
    assert code == 2
    assert words in err
    assert len(err.strip().splitlines()) == 1


def test_bytes():
    assert parse_bytes("80GB") == 80 * 10**9
    assert parse_bytes("1.5 gib") == 3 * 2**29
    with pytest.raises(OptionError):
        parse_bytes("many")
