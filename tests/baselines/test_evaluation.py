"""Baselines through `evaluate` and the command line, on the reference VLM."""

from __future__ import annotations

import json
import sys

import pytest
from PIL import Image

import capsight
from capsight.baselines import SnapKV, TokenMerging
from capsight.cli.app import main
from capsight.evaluation import evaluate, reference_items, summary


def test_baselines_are_judged_beside_capsules_at_equal_bytes():
    model, processor = capsight.load_reference_vlm()
    heads = capsight.KVCapsule.from_pretrained("reference-heads").with_retained(0.25)
    capsule = heads.with_codec("adaptive")
    methods = {
        "heads": heads,
        "capsule": capsule,
        "snapkv": SnapKV(0.25),
        "merge": TokenMerging(0.25),
        "evict": heads.with_codec("evict"),
        "all": SnapKV(1.0),
    }
    report = summary(evaluate(model, processor, list(reference_items("calibration", 2, 1)), methods))
    assert report["all"]["agreement"] == 100.0
    for name in ("heads", "snapkv", "merge", "evict"):
        assert report[name]["kv_bytes"] == pytest.approx(report["capsule"]["kv_bytes"], rel=0.01)
        assert report[name]["kl"] > 0
    assert report["evict"]["kv_bytes"] == report["capsule"]["kv_bytes"]


def test_eval_command_takes_every_kind_of_method(monkeypatch, capsys, tmp_path):
    Image.linear_gradient("L").convert("RGB").resize((224, 224)).save(tmp_path / "a.png")
    lines = tmp_path / "data.jsonl"
    lines.write_text('{"images": ["a.png"], "question": "what?", "answer": "x"}\n')
    arguments = ["eval", "--data", lines, "--calibration", lines, "--json", tmp_path / "out.json"]
    for name in ("heads", "adaptive", "evict", "uniform", "vl-cache", "feature-pca"):
        arguments += ["--method", name]
    for retained in (0.5, 0.25):
        arguments += ["--retained", retained]
    monkeypatch.setattr(sys, "argv", ["capsight", *map(str, arguments)])
    main_code = 0
    try:
        main()
    except SystemExit as stop:
        main_code = stop.code or 0
    assert main_code == 0, capsys.readouterr().err
    names = set(json.loads((tmp_path / "out.json").read_text())["methods"])
    assert {
        "full",
        "heads 0.25",
        "adaptive 0.5",
        "evict 0.25",
        "uniform 0.5",
        "vl-cache 0.25",
        "feature-pca 0.5",
    } <= names
    assert len(names) == 13
