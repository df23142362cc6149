"""The layer budget script, on two prompts."""

from __future__ import annotations

import json

import layer_budget


def test_both_budgets_on_the_same_questions_at_equal_bytes(tmp_path, capsys):
    path = tmp_path / "x.json"
    layer_budget.main(samples=1, images="2", retained="0.4,0.1", calibration=2, json=path)
    report = json.loads(path.read_text())
    names = [f"{name} {rho}" for rho in (0.4, 0.1) for name in ("water-filled", "uniform")]
    assert list(report["methods"]) == ["full", *names]
    assert [(row["method"], row["against"]) for row in report["paired"]] == [
        ("water-filled 0.4", "uniform 0.4"),
        ("water-filled 0.1", "uniform 0.1"),
    ]
    for ours, theirs in zip(names[::2], names[1::2], strict=True):
        assert report["methods"][ours]["kv_bytes"] == report["methods"][theirs]["kv_bytes"]
        assert sum(layer["kept"][ours] - layer["kept"][theirs] for layer in report["layers"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("|")[1].strip() for line in lines[-2:]] == ["0.4", "0.1"]
