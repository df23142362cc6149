"""Processors of all families load from a checkpoint's files with torchvision and without it."""

from __future__ import annotations

import pytest
import torch
import transformers
from packaging.version import Version
from transformers.utils import is_torchvision_available

import capsight
from capsight.cli.models import load_model
from capsight.errors import OptionError
from capsight.evaluation import Ask, Item, ask_item
from capsight.evaluation.prompting import process
from capsight.runtime import enable
from processors.checkpoints import EIGHT, save
from tiny import COMPLETE, FAMILIES

COUNTS_FIRST = ("smolvlm",) if Version(transformers.__version__) < COMPLETE else ()
"""Whose processors count videos before they look at any."""


@pytest.fixture(params=EIGHT)
def vlm(request):
    return FAMILIES[request.param]()


@pytest.mark.parametrize("form", ["parts", "whole"])
def test_a_checkpoint_gives_the_inputs_of_its_processor(vlm, tmp_path, form):
    processor = capsight.load_processor(str(save(vlm, tmp_path, form)))
    assert type(processor).__name__ == type(vlm.processor).__name__
    assert processor.tokenizer.padding_side == "left"
    samples = [([vlm.picture(0), vlm.picture(1)], "what?"), ([vlm.picture(2)], "and this one?")]
    wanted = vlm.inputs(samples)
    pieces = [
        {"role": "user", "content": [*[{"type": "image"}] * len(images), {"type": "text", "text": text}]}
        for images, text in samples
    ]
    texts = [processor.apply_chat_template([p], add_generation_prompt=True, tokenize=False) for p in pieces]
    images = [images for images, _ in samples]
    found = dict(processor(text=texts, images=images, return_tensors="pt", padding=True))
    within = 0.05 if is_torchvision_available() else 0  # its resizing rounds otherwise
    for name, value in wanted.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            assert torch.allclose(found[name], value, atol=within), name
        else:
            assert torch.equal(torch.as_tensor(found[name]), torch.as_tensor(value)), name


def test_a_model_answers_with_it(vlm, tmp_path):
    model, processor = load_model(str(save(vlm, tmp_path, "parts")), device="cpu")
    assert model.dtype == torch.float32
    item = Item("a", (vlm.picture(),), (Ask("what?", ""),))
    with enable(model) as fast, torch.no_grad():
        answers = ask_item(fast, processor, item, "after", 3)
    wanted = model(**process(processor, item, ["what?"])).logits[0, -1]
    assert torch.allclose(answers.first_logits[0], wanted, atol=1e-4)


@pytest.mark.skipif(is_torchvision_available(), reason="torchvision is there, and videos with it")
def test_it_says_what_it_cannot_do_and_can_be_saved(vlm, tmp_path):
    processor = capsight.load_processor(str(save(vlm, tmp_path, "whole")))
    assert type(processor).__name__ in repr(processor)
    (tmp_path / "again").mkdir()
    processor.save_pretrained(tmp_path / "again")
    if vlm.video_placeholder and vlm.name not in ("idefics3", *COUNTS_FIRST):
        from tiny import clip

        with pytest.raises(OptionError, match="torchvision"):
            processor(text=[vlm.video_placeholder], videos=[clip()], return_tensors="pt")


def test_dtype_of_the_checkpoint(tmp_path):
    vlm = FAMILIES["qwen2_5_vl"]()
    save(vlm, tmp_path, "parts")
    import copy

    copy.deepcopy(vlm.model).bfloat16().save_pretrained(tmp_path)
    assert load_model(str(tmp_path))[0].dtype == torch.bfloat16
    assert load_model(str(tmp_path), "float32")[0].dtype == torch.float32
    assert load_model("reference")[0].dtype == torch.float32


def test_what_cannot_be_loaded_is_said_in_one_line(tmp_path):
    vlm = FAMILIES["qwen2_5_vl"]()
    vlm.save(tmp_path)
    vlm.processor.tokenizer.save_pretrained(tmp_path)
    with pytest.raises(OptionError, match="cannot load the processor") as caught:
        capsight.load_processor(str(tmp_path))
    assert "\n" not in str(caught.value)
    (tmp_path / "config.json").write_text("[" * 100_000)
    for load in (capsight.load_processor, load_model):
        with pytest.raises(OptionError, match=r"cannot (load the|read the config)") as caught:
            load(str(tmp_path))
        assert "\n" not in str(caught.value)
    (tmp_path / "config.json").write_text('{"model_type": "qwen2_5_vl"}')
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(OptionError, match="cannot load the model"):
        load_model(str(tmp_path))
