"""Names of methods on a command line."""

from __future__ import annotations

import json
import sys

import pytest
from PIL import Image

import capsight
from capsight.cli.app import main
from capsight.cli.evaluate import calibration_prompts
from capsight.cli.methods import FIXED, METHOD_NAMES, make_methods
from capsight.cli.options import chosen_capsule, shares
from capsight.errors import OptionError
from capsight.kvcapsule import KVCapsule


def made(*names):
    return make_methods(
        list(names), [0.5, 0.25], lambda: KVCapsule.from_pretrained("reference-heads"), list, None
    )


def test_capsules_in_few_bits():
    names = ["heads", "adaptive", "heads-int8", "adaptive-int8", "heads-int4", "adaptive-int4", "evict"]
    methods = made(*names)
    assert list(methods)[4:6] == ["heads-int8 0.5", "heads-int8 0.25"]
    assert [m.info.bits for m in methods.values()][::2] == [None, None, 8, 8, 4, 4, None]
    assert [m.retained for m in methods.values()] == [0.5, 0.25] * len(names)
    assert [m.name for m in methods.values()][::2] == names


def test_names_are_unique_and_others_are_refused():
    assert len(set(METHOD_NAMES)) == len(METHOD_NAMES)
    for name in ("int8", "adaptive-int2", "static-int8", "evict-int8"):
        with pytest.raises(OptionError, match="no method"):
            made(name)


def test_baselines_take_the_tokens_of_a_picture_as_one_run():
    names = ["uniform", "merge", "snapkv", "feature-pca"]
    model, processor = capsight.load_reference_vlm()
    methods = make_methods(
        names, [0.5], list, lambda: calibration_prompts(processor, "reference", None)[:1], model, 49
    )
    assert [m.block_size for m in methods.values()] == [49] * len(names)


def test_static_is_fitted_at_every_fraction():
    assert FIXED == ("static", "static-mlp")
    model, processor = capsight.load_reference_vlm()
    fitted = make_methods(
        ["static"],
        [0.5, 0.25],
        lambda: KVCapsule.from_pretrained("reference-heads"),
        lambda: calibration_prompts(processor, "reference", None)[:2],
        model,
    )
    assert {label: (m.info.codec, m.retained) for label, m in fitted.items()} == {
        "static 0.5": ("static", 0.5),
        "static 0.25": ("static", 0.25),
    }


def test_fractions_are_named_in_either_way():
    assert shares(None, None) == []
    assert shares([0.3, 0.2], None) == [0.3, 0.2]
    assert shares(None, [0.9, 0.6, 0]) == [0.1, 0.4, 1.0]
    for wrong in (1.0, -0.1):
        with pytest.raises(OptionError, match="compression_ratio"):
            shares(None, [wrong])
    with pytest.raises(OptionError, match="not both"):
        shares([0.4], [0.6])
    named = chosen_capsule("reference", "reference", None, None, 0.75)
    assert named.retained == chosen_capsule("reference", "reference", 0.25, None).retained
    with pytest.raises(OptionError, match="not both"):
        chosen_capsule("reference", "reference", 0.25, None, 0.75)


@pytest.mark.parametrize(
    ("command", "given"),
    [
        (["ask", "x", "--prompt", "x"], ["--retained", "0.4"]),
        (["bench"], ["--retained", "0.4"]),
        (["demo"], ["--retained", "0.4"]),
        (["encapsulate", "--image", "x.png", "--out", "x"], ["--retained", "0.4"]),
        (["eval"], ["--retained", "0.4"]),
        (["fit", "--out", "x"], ["--retained", "0.4"]),
        (["plan"], ["--retained", "0.4"]),
    ],
)
def test_both_ways_at_once_are_one_clear_line(monkeypatch, capsys, tmp_path, command, given):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (56, 56)).save(tmp_path / "x.png")
    monkeypatch.setattr(sys, "argv", ["capsight", *command, *given, "--compression-ratio", "0.6"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    assert "not both" in capsys.readouterr().err


def test_a_plan_of_a_compression_ratio(monkeypatch, capsys, tmp_path):
    found = []
    for option in (["--retained", "0.25"], ["--compression-ratio", "0.75"]):
        monkeypatch.setattr(sys, "argv", ["capsight", "plan", *option, "--json", str(tmp_path / "plan.json")])
        with pytest.raises(SystemExit) as stop:
            main()
        assert not stop.value.code
        found.append(json.loads((tmp_path / "plan.json").read_text()))
    assert found[0] == found[1]
    assert found[0]["retained"] == 0.25
