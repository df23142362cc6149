"""`capsight inspect` on capsules: the budget drawn, and the same as JSON."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from capsight import KVCapsule
from capsight.cli.app import app
from capsight.errors import CapsuleFileError
from capsight.kvcapsule.budget import LayerNeeds


def inspected(path, tmp_path):
    result = CliRunner().invoke(app, ["inspect", str(path), "--json", str(tmp_path / "i.json")])
    assert result.exit_code == 0
    return result.output, json.loads((tmp_path / "i.json").read_text())


@pytest.fixture(scope="module")
def capsule():
    """The shipped capsule with needs made up: the later a layer, the more it needs."""
    found = KVCapsule.from_pretrained("reference-heads")
    layers = len(found.info.layers)
    shares = tuple((index + 1) / layers for index in range(layers))
    needs = LayerNeeds((16, 32), ((0.5, 0.2),) * layers, shares)
    return KVCapsule(found.codecs, replace(found.info, needs=needs, budget="uniform"))


def test_the_shipped_capsule(tmp_path):
    _, facts = inspected("reference", tmp_path)
    assert (facts["codec"], facts["retained"], facts["weights"]) == ("joint", 0.0488, "none")
    _, facts = inspected("reference-heads", tmp_path)
    assert (facts["codec"], facts["retained"], facts["weights"]) == ("heads", 0.4062, "none")


def test_budget_bits_and_weights(capsule, tmp_path):
    filled = capsule.with_codec("adaptive").with_budget("water-filled").with_bits(8).with_weights("stored")
    filled.save_pretrained(tmp_path / "filled")
    text, facts = inspected(tmp_path / "filled", tmp_path)
    assert (facts["budget"], facts["bits"], facts["weights"]) == ("water-filled", 8, "stored")
    rows = facts["per_layer"]
    assert [row["kept"] for row in rows] == [layer.kept for layer in filled.info.layers]
    assert rows[-1]["kept"] > rows[0]["kept"]
    assert rows[-1]["error"] < rows[0]["error"]
    assert rows[-1]["retained"] == rows[-1]["kept"] / 64
    lines = [line for line in text.splitlines() if "█" in line]
    assert len(lines) == len(rows)
    assert lines[-1].count("█") > lines[0].count("█")
    assert "water-filled" in text


def test_a_capsule_without_needs(capsule, tmp_path):
    old = KVCapsule(capsule.codecs, replace(capsule.info, needs=None)).with_codec("evict")
    old.save_pretrained(tmp_path / "old")
    text, facts = inspected(tmp_path / "old", tmp_path)
    assert (facts["budget"], facts["bits"], facts["weights"]) == ("uniform", "as in the cache", "none")
    assert {row["error"] for row in facts["per_layer"]} == {None}
    assert len({line.count("█") for line in text.splitlines() if "█" in line}) == 1


def test_folders_of_other_capsule_files_are_no_stores(tmp_path):
    """Such a folder holds no image of a store, and says what it lacks instead."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "mine.capsule").write_bytes(b"x")
    result = CliRunner().invoke(app, ["inspect", str(tmp_path)])
    assert isinstance(result.exception, CapsuleFileError)
