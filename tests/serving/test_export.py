"""`capsight export`: the folder is the model as it was, and says what to serve it with."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from capsight import HeadMap, KVCapsule
from capsight.blindsight import Category
from capsight.errors import CapsuleFileError, ModelMismatchError, OptionError, UnsupportedModelError
from capsight.processors import load_processor
from capsight.reference import load_reference_vlm, reference_path, split_prompt
from capsight.serving.checkpoint import served
from capsight.serving.export import check_carried, export_checkpoint
from cli.test_cli import run
from tiny import gemma3, qwen2_5_vl, qwen2_vl


def saved(tiny, folder):
    vlm = tiny.build()
    vlm.model.save_pretrained(folder)
    vlm.processor.tokenizer.save_pretrained(folder)
    return vlm


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


def test_reference_is_what_it_was(monkeypatch, capsys, tmp_path):
    out = tmp_path / "new" / "served"
    options = ("--capsule", "reference", "--head-map", "reference", "--retained", 0.04, "--out", out)
    code, said, _ = run(monkeypatch, capsys, "export", "reference", *options)
    assert code == 0
    assert f"capsight serve {out}" in said.replace("\n", "")
    entry = served(out, whole=True)
    assert (entry.capsule, entry.head_map, entry.retained) == ("capsule", "head_map", 0.04)
    assert HeadMap.from_pretrained(out / "head_map") == HeadMap.from_pretrained("reference")
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == ["CapsightQwen2_5_VLForConditionalGeneration"]
    assert config["is_mm_prefix_lm"] is True
    assert json.loads((out / "processor_config.json").read_text())["processor_class"] == "Qwen2_5_VLProcessor"
    video = json.loads((out / "video_preprocessor_config.json").read_text())
    assert (video["patch_size"], video["merge_size"], video["image_mean"]) == (14, 2, [0.5, 0.5, 0.5])

    model, processor = load_reference_vlm()
    again = AutoModelForImageTextToText.from_pretrained(out, dtype=torch.float32).eval()
    KVCapsule.from_pretrained(out / "capsule").check_model(again)
    scenes = split_prompt("test", 0, 2).scenes
    messages = [{"role": "user", "content": [{"type": "image"}] * 2 + [{"type": "text", "text": "what?"}]}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    given = {"text": [text], "images": [[scene.image for scene in scenes]], "return_tensors": "pt"}
    inputs, same = processor(**given), load_processor(str(out))(**given)
    assert torch.equal(inputs["input_ids"], same["input_ids"])
    assert torch.equal(inputs["pixel_values"], same["pixel_values"])
    assert torch.equal(logits(model, inputs), logits(again, same))


@pytest.mark.parametrize("tiny", [qwen2_vl, qwen2_5_vl])
def test_families_are_what_they_were(tiny, tmp_path):
    vlm = saved(tiny, tmp_path / "model")
    heads = HeadMap.uniform(Category.SINK, 3, 4)
    sizes = []
    export_checkpoint(
        tmp_path / "model", tmp_path / "out", vlm.model, head_map=heads, copied=lambda n: sizes.append(n)
    )
    assert sum(sizes) > (tmp_path / "model" / "model.safetensors").stat().st_size
    assert served(tmp_path / "out", whole=True).retained is None
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "out").eval()
    inputs = vlm.inputs([([vlm.picture(0), vlm.picture(1)], "what?")])
    assert torch.equal(logits(vlm.model, inputs), logits(again, inputs))


def test_an_export_can_be_exported(tmp_path):
    vlm = saved(qwen2_vl, tmp_path / "model")
    heads = HeadMap.all_dense(3, 4)
    export_checkpoint(tmp_path / "model", tmp_path / "one", vlm.model, head_map=heads)
    export_checkpoint(tmp_path / "one", tmp_path / "two", vlm.model, retained=0.4)
    assert (served(tmp_path / "two").head_map, served(tmp_path / "two").retained) == (None, 0.4)
    assert not (tmp_path / "two" / "head_map").exists()


def test_what_the_plugin_cannot_run_is_refused(tmp_path):
    with pytest.raises(UnsupportedModelError, match="not gemma3"):
        check_carried(gemma3.build().config)
    for changes in (
        {"rope_type": "linear", "factor": 2.0},
        {"rope_type": "longrope", "factor": 1.0, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8},
    ):
        config = qwen2_5_vl.build().config
        config.text_config.rope_parameters |= changes
        with pytest.raises(UnsupportedModelError, match="rotary"):
            check_carried(config)
    config = qwen2_5_vl.build().config
    config.text_config.layer_types[1] = "sliding_attention"
    with pytest.raises(UnsupportedModelError, match="sliding"):
        check_carried(config)


@pytest.mark.parametrize("tiny", [qwen2_vl, qwen2_5_vl])
def test_configs_in_their_older_form(tiny, tmp_path):
    values = tiny.build().config.to_dict()
    text = values.pop("text_config")
    text.pop("model_type")
    text.pop("layer_types")
    rope = text.pop("rope_parameters")
    values |= text | {"rope_theta": 1e6, "sliding_window": 1024, "max_window_layers": 1}
    values["rope_scaling"] = {"type": "mrope", "mrope_section": rope["mrope_section"]}
    for sliding in (False, True):
        values["use_sliding_window"] = sliding
        (tmp_path / "config.json").write_text(json.dumps(values))
        config = AutoConfig.from_pretrained(tmp_path)
        if not sliding:
            check_carried(config)
            continue
        with pytest.raises(UnsupportedModelError, match="sliding"):
            check_carried(config)


def test_wrong_input(tmp_path):
    vlm = saved(qwen2_vl, tmp_path / "model")
    source, out = tmp_path / "model", tmp_path / "out"
    heads = HeadMap.all_dense(3, 4)
    with pytest.raises(OptionError, match="what to serve"):
        export_checkpoint(source, out, vlm.model)
    for retained in (0.0, 1.5, -1, float("nan")):
        with pytest.raises(OptionError, match="above 0"):
            export_checkpoint(source, out, vlm.model, retained=retained)
    for inside in (source, source / "out", tmp_path):
        with pytest.raises(OptionError, match="own folder"):
            export_checkpoint(source, inside, vlm.model, head_map=heads)
    with pytest.raises(ModelMismatchError, match="3 of 4"):
        export_checkpoint(source, out, vlm.model, head_map=HeadMap.all_dense(3, 8))
    with pytest.raises(ModelMismatchError, match="other weights"):
        export_checkpoint(source, out, vlm.model, head_map=heads.for_model("0" * 64))
    with pytest.raises(ModelMismatchError, match="another"):
        export_checkpoint(
            source, out, vlm.model, retained=0.04, capsule=KVCapsule.from_pretrained("reference")
        )
    with pytest.raises(OptionError, match="not of heads"):
        export_checkpoint(source, out, vlm.model, capsule=KVCapsule.from_pretrained("reference-heads"))
    with pytest.raises(OptionError, match="larger retained"):
        export_checkpoint(
            source, out, vlm.model, capsule=KVCapsule.from_pretrained("reference"), retained=0.0001
        )
    out.mkdir()
    (out / "mine.txt").write_text("x")
    with pytest.raises(OptionError, match="no exported checkpoint"):
        export_checkpoint(source, out, vlm.model, head_map=heads, overwrite=True)
    assert [path.name for path in out.iterdir()] == ["mine.txt"]
    (source / "model.safetensors").rename(source / "model.bin")
    with pytest.raises(OptionError, match="safetensors"):
        export_checkpoint(source, tmp_path / "other", vlm.model, head_map=heads)


def test_a_missing_shard_is_named(tmp_path):
    vlm = qwen2_vl.build()
    vlm.model.save_pretrained(tmp_path / "model", max_shard_size="100KB")
    shards = sorted((tmp_path / "model").glob("*.safetensors"))
    assert len(shards) > 1
    shards[0].unlink()
    with pytest.raises(OptionError, match=shards[0].name):
        export_checkpoint(tmp_path / "model", tmp_path / "out", vlm.model, retained=0.4)


def test_it_is_there_whole_or_not_at_all(tmp_path):
    vlm = saved(qwen2_vl, tmp_path / "model")
    source, out = tmp_path / "model", tmp_path / "made" / "out"

    def stop(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_checkpoint(source, out, vlm.model, retained=0.4, copied=stop)
    assert list(out.parent.iterdir()) == []
    export_checkpoint(source, out, vlm.model, retained=0.4)
    with pytest.raises(OptionError, match="--overwrite"):
        export_checkpoint(source, out, vlm.model, retained=0.2)
    with pytest.raises(KeyboardInterrupt):
        export_checkpoint(source, out, vlm.model, retained=0.2, overwrite=True, copied=stop)
    assert served(out, whole=True).retained == 0.4
    export_checkpoint(source, out, vlm.model, retained=0.2, overwrite=True)
    assert served(out, whole=True).retained == 0.2
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert not any(path.name.startswith(".") for path in out.iterdir())


def test_changes_are_noticed(tmp_path):
    vlm = saved(qwen2_vl, tmp_path / "model")
    out = tmp_path / "out"
    export_checkpoint(tmp_path / "model", out, vlm.model, head_map=HeadMap.all_dense(3, 4))
    for name, change in (
        ("config.json", lambda data: data.replace(b"true", b"false", 1)),
        ("head_map/head_map.json", lambda data: data[:-1]),
        ("model.safetensors", lambda data: data[:-1]),
    ):
        kept = (out / name).read_bytes()
        (out / name).write_bytes(change(kept))
        with pytest.raises(CapsuleFileError, match="changed"):
            served(out)
        (out / name).write_bytes(kept)
    data = bytearray((out / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (out / "model.safetensors").write_bytes(data)
    served(out)
    with pytest.raises(CapsuleFileError, match="changed"):
        served(out, whole=True)
    (out / "capsight.json").unlink()
    with pytest.raises(CapsuleFileError, match="no exported checkpoint"):
        served(out)


def test_command_says_what_is_wrong(monkeypatch, capsys, tmp_path):
    shutil.copytree(reference_path(), tmp_path / "model")
    out = ("--out", tmp_path / "out")
    for arguments, expected in (
        (("reference", *out), "name --capsule"),
        (("reference", "--capsule", "reference-heads", *out), "codec joint"),
        (("reference", "--retained", 0.4, "--compression-ratio", 0.6, *out), "not both"),
        (("reference", "--retained", 2, *out), "retained"),
        (("reference", "--head-map", tmp_path / "none", *out), "none"),
        ((tmp_path / "nothing", "--retained", 0.4, *out), "nothing"),
        ((tmp_path / "model", "--retained", 0.4, "--out", tmp_path / "model"), "own folder"),
    ):
        code, _, err = run(monkeypatch, capsys, "export", *arguments)
        assert code == 2, arguments
        assert expected in err.replace("\n", "")
    assert not (tmp_path / "out").exists()
