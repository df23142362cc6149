"""Bad input of any command: exit code 2 and one line that says what is wrong."""

from __future__ import annotations

import pytest

from capsight.reference import reference_path

from .test_cli import run


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["generate", "--prompt", "x", "--image", "none.png"], "none.png"),
        (["generate", "--prompt", "x", "--model", "/no/such/folder"], "--capsule"),
        (["generate", "--prompt", "x", "--model", reference_path()], "--capsule"),
        (["generate", "--prompt", "x", "--capsule", "/no/such/folder"], "/no/such/folder"),
        (["generate", "--prompt", "x", "--retained", "1.5"], "1.5"),
        (["generate", "--prompt", "x", "--dtype", "int3"], "int3"),
        (["generate", "--prompt", "x", "--protocol", "before"], "before"),
        (["generate", "--prompt", "x", "--max-new-tokens", "0"], "max-new-tokens"),
        (["generate", "--prompt", "x", "--decode", "fused"], "decode"),
        (["generate", "--prompt", "x", "--bits", "5"], "5"),
        (["generate", "--prompt", "x", "--capsule", "none", "--bits", "8"], "full cache"),
        (["generate", "--prompt", "x", "--capsule", "none", "--retained", "0.5"], "full cache"),
        (["generate", "--prompt", "x", "--capsule", "none", "--decode", "latent"], "capsule="),
        (["demo", "--decode", "fused"], "decode"),
        (["bench", "--decode", "fused"], "decode"),
        (["fit", "--out", "x", "--data", "/no/such.jsonl"], "/no/such.jsonl"),
        (["fit", "--out", "x", "--retained", "0"], "retained"),
        (["fit", "--out", "x", "--samples", "0"], "samples"),
        (["inspect", "/no/such/folder"], "/no/such/folder"),
        (["eval", "--images", "one"], "one"),
        (["eval", "--method", "magic"], "magic"),
        (["eval", "--tasks", "magic"], "magic"),
        (["eval", "--head-map", "/no/such/folder"], "/no/such/folder"),
        (["eval", "--max-new-tokens", "0"], "max-new-tokens"),
        (["bench", "--batch", "none"], "none"),
        (["bench", "--runs", "0"], "runs"),
        (["bench", "--kv-budget", "much"], "much"),
        (["calibrate", "--out", "x", "--criterion", "taste"], "taste"),
        (["attention", "--head-map", "/no/such/folder"], "/no/such/folder"),
        (["attention", "--head-map", "x", "--head", "one"], "one"),
        (["demo", "--json", "/no/such/folder/x.json"], "does not exist"),
        (["demo", "--images", "0"], "at least 1"),
    ],
)
def test_bad_input_is_one_clear_line(monkeypatch, capsys, tmp_path, arguments, words):
    monkeypatch.chdir(tmp_path)
    code, _, err = run(monkeypatch, capsys, *arguments)
    assert code == 2
    assert words in err
    assert "Traceback" not in err
    assert len(err.strip().splitlines()) == 1
