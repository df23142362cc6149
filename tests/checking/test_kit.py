"""The family kit on every family's tiny model, on a config made small, and on models that are not right."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import transformers
from packaging.version import Version
from typer.testing import CliRunner

from capsight.checking import CHECKS, Case, run_checks, tiny_model
from capsight.cli.app import app
from capsight.errors import CapsightError, OptionError, UnsupportedModelError
from tiny import COMPLETE, FAMILIES, TinyVLM, clip


def case_of(vlm: TinyVLM) -> Case:
    def videos() -> dict[str, torch.Tensor]:
        return vlm.video_inputs([([clip()], "a"), ([clip(1), clip(2)], "bb")])

    return Case(vlm.model, vlm.inputs, (vlm.size, vlm.other_size), videos if vlm.video_placeholder else None)


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_every_family_passes_the_kit(name):
    results = run_checks(case_of(FAMILIES[name]()))
    assert [(r.name, r.detail) for r in results if r.passed is False] == []
    skipped = {r.name for r in results if r.passed is None}
    older = Version(transformers.__version__) < COMPLETE  # EXAONE 4.5 itself has no beams over pictures
    lacking = {"video": not FAMILIES[name]().video_placeholder, "beams": older}
    assert skipped <= {check for check, lacks in lacking.items() if lacks}


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_a_config_made_small_reads_the_same_prompts(name):
    vlm = FAMILIES[name]()
    before = vlm.config.to_dict()
    small = tiny_model(vlm.config)
    assert vlm.config.to_dict() == before
    case = Case(small, vlm.inputs, (vlm.size, vlm.other_size))
    results = run_checks(case, ["layout", "joint 1.0", "joint 0.4"])
    assert [(r.name, r.detail) for r in results if not r.passed] == []


def test_a_wrong_model_is_found_out():
    vlm = FAMILIES["qwen2_5_vl"]()
    model, calls = copy.deepcopy(vlm.model), []

    def drift(module, args, logits):
        calls.append(1)
        return logits + 0.01 * len(calls)

    model.lm_head.register_forward_hook(drift)
    results = run_checks(Case(model, vlm.inputs, (vlm.size, vlm.other_size)), ["layout", "heads 1.0"])
    assert [r.passed for r in results] == [True, False]
    assert "logits differ by" in results[1].detail


def test_the_command_line(tmp_path):
    wanted = ["layout", "heads 1.0", "ask, crop"]
    options = [option for name in wanted for option in ("--check", name)]
    out = tmp_path / "out.json"
    ran = CliRunner().invoke(app, ["check-model", "reference", *options, "--json", str(out)])
    assert ran.exit_code == 0, ran.output
    found = json.loads(out.read_text())
    assert found["model_type"] == "qwen2_5_vl"
    assert [(check["name"], check["passed"]) for check in found["checks"]] == [(n, True) for n in wanted]


@pytest.mark.parametrize(
    ("arguments", "kind"),
    [
        (["reference", "--check", "nothing"], OptionError),
        (["reference", "--size", "0"], OptionError),
        (["no-such-folder/model"], OptionError),
    ],
)
def test_bad_arguments(arguments, kind):
    ran = CliRunner().invoke(app, ["check-model", *arguments])
    assert isinstance(ran.exception, kind)


def test_unsupported_models_are_refused_before_their_processor_is_read(tmp_path):
    from transformers import AutoConfig

    AutoConfig.for_model("mllama").save_pretrained(tmp_path)
    ran = CliRunner().invoke(app, ["check-model", str(tmp_path)])
    assert isinstance(ran.exception, UnsupportedModelError)
    assert isinstance(ran.exception, CapsightError)


def test_there_are_checks():
    assert len(CHECKS) == 14
