"""Commands around head maps, as a user would type them."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from capsight.blindsight import Category, HeadMap
from capsight.blindsight.head_map_file import FILE_NAME
from capsight.cli import demo, demo_sides, models

from .test_cli import run


@pytest.fixture
def calibrated(tmp_path):
    """A map made by hand, for the reference VLM's shape."""
    categories = (Category.DENSE, Category.SINK, Category.INTRA_IMAGE, Category.INTRA_IMAGE_SINK)
    HeadMap(((*categories, *categories),) * 8).save_pretrained(tmp_path / "map")
    return tmp_path / "map"


def test_calibrate_with_every_option_then_inspect(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("capsight.cli.calibrate.REFERENCE_IMAGES", (2, 3))  # short prompts
    folder = tmp_path / "map"
    code, out, _ = run(
        monkeypatch, capsys, "calibrate", "--out", folder, "--samples", 6, "--held-out", 2,
        "--tolerance", 0.9, "--criterion", "mass", "--unit", "layer", "--alpha", "0.5,0.9",
        "--sink-tokens", 2, "--own-window", 16,
    )  # fmt: skip
    assert code == 0
    assert "6 prompts voted, 2 were held out" in out
    assert "of answers change" in out
    assert Image.open(folder / "head_map.png").width > 100
    found = HeadMap.from_pretrained(folder)
    assert (found.options.sink_tokens, found.options.own_window) == (2, 16)
    assert found.calibration.unit == "layer"
    assert found.calibration.thresholds["alpha_last"] == 0.9
    code, out, _ = run(monkeypatch, capsys, "inspect", folder, "--json", tmp_path / "i.json")
    assert code == 0
    assert "mass, layer by layer" in out
    facts = json.loads((tmp_path / "i.json").read_text())
    assert facts["tolerance"] == "0.9"
    assert len(facts["categories"]) == found.num_layers


def test_inspect_a_head_map_made_by_hand(monkeypatch, capsys, calibrated):
    for path in (calibrated, calibrated / FILE_NAME):
        code, out, _ = run(monkeypatch, capsys, "inspect", path)
        assert code == 0
        assert "any model of this shape" in out
        assert "D s i + D s i +" in out


def test_demo_shows_the_head_map(monkeypatch, capsys, tmp_path, calibrated):
    monkeypatch.setattr(demo_sides, "ROUNDS", 1)
    monkeypatch.setattr(demo, "reference_head_map", lambda: HeadMap.from_pretrained(calibrated))
    code, out, _ = run(
        monkeypatch, capsys, "demo", "--no-compiled", "--images", 3, "--questions", 2,
        "--json", tmp_path / "demo.json", "--png", tmp_path / "demo.png",
    )  # fmt: skip
    assert code == 0
    assert "of it attention" in out
    assert "(-" in out
    figures = json.loads((tmp_path / "demo.json").read_text())
    assert len(figures["sides"]) == 2
    sparse = figures["with_head_map"]
    assert len(sparse["answers"]) == len(sparse["right"]) == 2
    assert 0 < sparse["prefill_flops_saved"] < sparse["attention_flops_saved"] < 1
    assert sparse["ttft_s"] > 0


def test_no_shipped_head_map_is_no_error(monkeypatch, tmp_path):
    monkeypatch.setattr(models, "REFERENCE", str(tmp_path))
    assert models.reference_head_map() is None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["calibrate", "--out", "x", "--alpha", "much"], "alpha"),
        (["calibrate", "--out", "x", "--alpha", "1,2,3"], "alpha"),
        (["calibrate", "--out", "x", "--unit", "model"], "unit"),
        (["calibrate", "--out", "x", "--sink-tokens", "-1"], "sink_tokens"),
        (["calibrate", "--out", "x", "--samples", "0"], "samples"),
        (["calibrate", "--out", "x", "--held-out", "0"], "held-out 0"),
        (["inspect", "/no/such/head_map.json"], "/no/such/head_map.json"),
    ],
)
def test_bad_input_is_one_clear_line(monkeypatch, capsys, tmp_path, arguments, words):
    monkeypatch.chdir(tmp_path)
    code, _, err = run(monkeypatch, capsys, *arguments)
    assert code == 2
    assert words in err
    assert len(err.strip().splitlines()) == 1
