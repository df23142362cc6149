"""Which models are taken, which are refused and why, and adapters that other packages register."""

from __future__ import annotations

import copy
from importlib.metadata import EntryPoint

import pytest
from transformers import AutoConfig, LlamaConfig

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
        ("aria", "no layout adapter"),
    ],
)
def test_the_refusal_says_why_and_what_is_supported(name, why):
    with pytest.raises(UnsupportedModelError, match=why) as error:
        family_for(AutoConfig.for_model(name))
    assert ", ".join(supported_families()) in str(error.value)
    assert "config of the whole" not in str(error.value)


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


@pytest.mark.parametrize("value", [f"{__name__}:Other", f"{__name__}:SHARED"])
def test_a_registered_adapter(entry_points, value):
    entry_points(value)
    assert "other_vl" in supported_families()
    vlm = FAMILIES["qwen2_vl"]()
    config = copy.deepcopy(vlm.config)
    config.model_type = "other_vl"
    inputs = vlm.inputs([([vlm.picture(0)], "hi")])
    assert build_layout(inputs, config) == build_layout(inputs, vlm.config)


@pytest.mark.parametrize(
    ("value", "why"), [("no_such_module:x", "No module"), (f"{__name__}:Taken", "qwen2_vl, which is taken")]
)
def test_an_adapter_that_cannot_be_used(entry_points, value, why):
    entry_points(value)
    with pytest.raises(UnsupportedModelError, match=why):
        supported_families()
    family_for(FAMILIES["qwen2_vl"]().config)  # those of the package itself work
