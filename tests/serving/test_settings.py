"""What an engine is told, and what it is refused for. Needs no vLLM."""

from __future__ import annotations

import logging
import shutil
import sys
from types import SimpleNamespace

import pytest

from capsight import KVCapsule
from capsight.errors import CapsuleFileError, UnsupportedModelError
from capsight.reference import load_reference_vlm, reference_path
from capsight.serving.checkpoint import Served, carried
from capsight.serving.export import export_checkpoint
from capsight.serving.vllm import plugin, settings


def engine(entry=None, additional=None, **changes):
    """A `VllmConfig` in which nothing is in the way, but for `changes` (`part__option`)."""
    parts = {
        "device_config": {"device_type": "cpu"},
        "cache_config": {"cache_dtype": "auto"},
        "model_config": {
            "hf_config": SimpleNamespace(**({} if entry is None else {"capsight": entry})),
            "hf_text_config": SimpleNamespace(sliding_window=None),
            "use_mla": False,
            "is_hybrid": False,
            "is_mm_prefix_lm": True,
            "rswa_window": 1 << 30,
        },
        "parallel_config": {
            "decode_context_parallel_size": 1,
            "prefill_context_parallel_size": 1,
            "pipeline_parallel_size": 1,
        },
    }
    whole = {"additional_config": additional or {}, "speculative_config": None, "kv_transfer_config": None}
    whole |= {"use_v2_model_runner": False, "lora_config": None}
    for name, value in changes.items():
        part, _, option = name.partition("__")
        (parts[part] if option else whole)[option or part] = value
    return SimpleNamespace(**whole, **{name: SimpleNamespace(**part) for name, part in parts.items()})


def test_what_is_read():
    entry = {"version": 1, "capsule": None, "head_map": "head_map", "retained": 0.4}
    assert settings.served_by(engine()) is None
    assert settings.served_by(engine(entry)) == Served(None, "head_map", 0.4)
    assert settings.served_by(engine(entry, {"capsight": {"retained": 0.2}})) == Served(None, None, 0.2)
    settings.check_engine(engine(entry))


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ({"retained": 0}, "retained is 0, expected greater than 0"),
        ({"retained": 1.5}, "retained is 1.5, expected less than or equal to 1"),
        ({"retained": "much"}, "retained is 'much'"),
        ({"kept": 1}, "kept is 1"),
        (3, "is 3"),
        ("x", "is 'x'"),
    ],
)
def test_entries_that_say_nothing_sensible(entry, says):
    with pytest.raises(CapsuleFileError, match="; export the checkpoint again") as error:
        settings.served_by(engine(entry))
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_a_later_version():
    with pytest.raises(UnsupportedModelError, match="version 2"):
        settings.served_by(engine({"version": 2}))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"device_config__device_type": "cuda"}, "CPU"),
        ({"use_v2_model_runner": True}, "CPU"),
        ({"speculative_config": object()}, "speculative"),
        ({"kv_transfer_config": object()}, "connectors"),
        ({"cache_config__cache_dtype": "fp8"}, "quantised KV cache"),
        ({"lora_config": object()}, "LoRA"),
        ({"model_config__use_mla": True}, "MLA"),
        ({"model_config__is_hybrid": True}, "hybrid"),
        ({"model_config__hf_text_config": SimpleNamespace(sliding_window=4096)}, "sliding windows"),
        ({"model_config__is_mm_prefix_lm": False}, "capsight export"),
        ({"model_config__rswa_window": None}, "capsight export"),
        ({"parallel_config__decode_context_parallel_size": 2}, "decode context"),
        ({"parallel_config__prefill_context_parallel_size": 2}, "prefill context"),
        ({"parallel_config__pipeline_parallel_size": 2}, "pipeline"),
    ],
)
def test_engines_that_are_refused(change, says):
    with pytest.raises(UnsupportedModelError, match=says):
        settings.check_engine(engine({"retained": 0.4}, **change))


def test_latents_need_all_heads():
    settings.check_engine(engine({"retained": 0.4}, parallel_config__tensor_parallel_size=2))
    settings.check_engine(engine({"capsule": "capsule"}, parallel_config__tensor_parallel_size=1))
    with pytest.raises(UnsupportedModelError, match="a capsule and tensor parallelism"):
        settings.check_engine(engine({"capsule": "capsule"}, parallel_config__tensor_parallel_size=2))


def test_another_vllm_is_left_as_it_is(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "vllm.v1.kv_cache_spec_registry", None)
    problem = settings.missing_api()
    assert problem is not None
    assert problem.startswith("capsight's plugin runs in vLLM 0.32, and this one has no vllm.v1.")
    with caplog.at_level(logging.WARNING):
        plugin.register()
        plugin.register()
    assert "exported checkpoints cannot be served" in caplog.text


def test_an_engine_serves_with_what_was_exported_and_nothing_else(tmp_path):
    def folder(name, **entry):
        model = SimpleNamespace(model=str(name), revision=None)
        return carried(model, Served(**{"capsule": None, "head_map": None, "retained": None} | entry))

    out, capsule = tmp_path / "model", KVCapsule.from_pretrained("reference")
    export_checkpoint(reference_path(), out, load_reference_vlm()[0], capsule=capsule)
    assert folder(out, capsule="capsule", retained=0.02) == str(out)
    assert folder("anywhere", retained=0.4) == "anywhere"
    with pytest.raises(CapsuleFileError, match="exported without 'head_map'"):
        folder(out, head_map="head_map")
    with pytest.raises(CapsuleFileError, match=r"exported without '\.\./capsule'"):
        folder(out, capsule="../capsule")
    with pytest.raises(CapsuleFileError, match="no exported checkpoint"):
        folder(reference_path(), capsule="capsule")
    changed = shutil.copytree(out, tmp_path / "changed")
    capsule.with_retained(0.01).save_pretrained(changed / "capsule")  # sound, but not what was exported
    with pytest.raises(CapsuleFileError, match="export the checkpoint again"):
        folder(changed, capsule="capsule")
