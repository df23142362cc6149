"""Which models are taken, which are refused and why, and adapters that other packages register."""

from __future__ import annotations

import copy
import json
import sys
from importlib.metadata import EntryPoint
from types import SimpleNamespace

import pytest
from transformers import CONFIG_MAPPING, AutoConfig, LlamaConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from capsight.cli.app import main
from capsight.cli.models import load_model
from capsight.errors import UnsupportedModelError
from capsight.layout import build_layout, families, supported_families
from capsight.layout.families import family_for
from capsight.layout.families.qwen2_vl import Qwen2VL
from tiny import FAMILIES


@pytest.fixture
def entry_points(monkeypatch):
    """Put these entry points in place of those that are installed."""

    def register(*values: str) -> None:
        points = [EntryPoint(f"p{i}", value, families.ENTRY_POINTS) for i, value in enumerate(values)]
        monkeypatch.setattr(families, "entry_points", lambda group: points)
        families._registered.cache_clear()

    yield register
    monkeypatch.undo()
    families._registered.cache_clear()


class Other(Qwen2VL):
    model_types = ("other_vl",)


SHARED = Other()


class Taken(Qwen2VL):
    pass


@pytest.mark.parametrize("config", [LlamaConfig(), object(), FAMILIES["qwen2_5_vl"]().config.text_config])
def test_text_models_are_told_apart(config):
    with pytest.raises(UnsupportedModelError, match="no vision-language model; pass"):
        build_layout({"input_ids": [[1, 2]]}, config)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("mllama", "cross-attention"),
        ("paligemma", "see each other"),
        ("kimi_k25", "MLA"),
        ("qwen4_exp", "indexer"),
        ("blip-2", "next to nothing to compress"),
        ("chameleon", "codes of its vocabulary"),
        ("dots3_note", "indexer"),
        ("aria", "no layout adapter"),
    ],
)
def test_the_refusal_says_why_and_what_is_supported(name, why):
    if name not in CONFIG_MAPPING:
        pytest.skip("this transformers does not know it")
    with pytest.raises(UnsupportedModelError, match=why) as error:
        family_for(AutoConfig.for_model(name))
    assert ", ".join(supported_families()) in str(error.value)
    assert "config of the whole" not in str(error.value)


def test_every_class_that_transformers_would_load_is_taken_or_refused():
    """None is mistaken for the config of a text model."""
    others = {*supported_families(), "vision-encoder-decoder"}  # whose config is made of two that are given
    for name in sorted(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.keys() - others):
        with pytest.raises(UnsupportedModelError, match=r"is not supported: |no layout adapter") as error:
            family_for(AutoConfig.for_model(name))
        assert "pass the config" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ({"kv_lora_rank": 8}, "MLA"),
        ({"layer_types": ["indexed_attention"]}, "indexer"),
        ({"layer_types": ["hybrid"]}, "hold states"),
        ({"num_kv_shared_layers": 2}, "reuse the keys"),
        ({"is_encoder_decoder": True}, "cross-attention"),
    ],
)
def test_configs_of_unknown_types_are_looked_into(text, why):
    inner = SimpleNamespace(**text)
    config = SimpleNamespace(
        model_type="new_vl",
        vision_config=object(),
        get_text_config=lambda decoder: inner,
        is_encoder_decoder=text.get("is_encoder_decoder", False),
    )
    with pytest.raises(UnsupportedModelError, match=f"'new_vl' is not supported: .*{why}"):
        family_for(config)


def test_gemma_with_shared_keys_is_refused():
    config = copy.deepcopy(FAMILIES["gemma4"]().config)
    config.text_config.num_kv_shared_layers = 2
    with pytest.raises(UnsupportedModelError, match=r"last 2 layers .* reuse the keys"):
        family_for(config)
    config.text_config.num_kv_shared_layers = 0
    config.text_config.use_bidirectional_attention = "all"
    with pytest.raises(UnsupportedModelError, match="attend to each other"):
        family_for(config)


def test_the_command_line_looks_at_the_config_first(tmp_path):
    """There is nothing else in the folder, so any later step would fail otherwise."""
    AutoConfig.for_model("mllama").save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="cross-attention"):
        load_model(str(tmp_path))


@pytest.mark.parametrize("extra", [{}, {"auto_map": {"AutoConfig": "configuration_new.NewConfig"}}])
@pytest.mark.parametrize("command", ["plan", "check-model", "generate"])
def test_a_type_that_transformers_does_not_know(command, extra, monkeypatch, capsys, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "new_vl"} | extra))
    named = [str(tmp_path)] if command == "check-model" else ["--model", str(tmp_path)]
    options = ["--capsule", "none", "--prompt", "what?"] if command == "generate" else []
    monkeypatch.setattr(sys, "argv", ["capsight", command, *named, *options])
    with pytest.raises(SystemExit) as stop:
        main()
    said = capsys.readouterr().err.strip()
    assert stop.value.code == 2
    assert len(said.splitlines()) == 1
    assert "'new_vl', which transformers" in said
    assert "trust_remote_code" not in said
    assert "qwen3_vl" in said


@pytest.mark.parametrize("value", [f"{__name__}:Other", f"{__name__}:SHARED"])
def test_a_registered_adapter(entry_points, value):
    entry_points(value)
    assert "other_vl" in supported_families()
    vlm = FAMILIES["qwen2_vl"]()
    config = copy.deepcopy(vlm.config)
    config.model_type = "other_vl"
    inputs = vlm.inputs([([vlm.picture(0)], "hi")])
    assert build_layout(inputs, config) == build_layout(inputs, vlm.config)


def test_an_installed_package_brings_a_family(monkeypatch, tmp_path):
    family = "from capsight.layout.families.qwen2_vl import Qwen2VL\n\nclass Theirs(Qwen2VL):\n"
    (tmp_path / "their_family.py").write_text(f"{family}    model_types = ('their_vl',)\n")
    about = tmp_path / "theirs-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(f"[{families.ENTRY_POINTS}]\ntheirs = their_family:Theirs\n")
    monkeypatch.syspath_prepend(tmp_path)
    families._registered.cache_clear()
    try:
        assert type(family_for(SimpleNamespace(model_type="their_vl"))).__name__ == "Theirs"
    finally:
        families._registered.cache_clear()


@pytest.mark.parametrize(
    ("value", "why"),
    [("no_such_module:x", "No module"), (f"{__name__}:Taken", "paddleocr_vl, which is taken")],
)
def test_an_adapter_that_cannot_be_used(entry_points, value, why):
    entry_points(value)
    with pytest.raises(UnsupportedModelError, match=why):
        supported_families()
    family_for(FAMILIES["qwen2_vl"]().config)  # those of the package itself work
