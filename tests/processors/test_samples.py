"""Samples of fit and calibrate: chat messages and keyword arguments, with pictures as they are shown."""

from __future__ import annotations

import base64
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

from capsight import KVCapsule
from capsight.blindsight.calibrate.samples import prompts
from capsight.errors import CalibrationError, CapsightError, OptionError
from capsight.pictures import picture
from capsight.processors.samples import sample_inputs
from tiny import FAMILIES

TEMPLATE = (
    "{% for m in messages %}{% for p in m['content'] %}{% if p['type'] == 'image' %}IMAGE{% else %}"
    "{{ p['text'] }}{% endif %}{% endfor %}{% endfor %}"
)


def messages(source, key="image"):
    return [{"role": "user", "content": [{"type": "image", key: source}, {"type": "text", "text": "what"}]}]


def strange(vlm, tmp_path):
    """The same picture turned by EXIF, with transparency, in 16 bits, as a file, an array and base64."""
    seen = np.array(vlm.picture(3))
    clear = np.dstack([seen, np.full(seen.shape[:2], 255, np.uint8)])
    clear[:8, :8, 3] = 0
    turned, exif = Image.fromarray(np.rot90(seen, 1).copy()), Image.Exif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.png", exif=exif)
    grey = Image.fromarray(np.array(vlm.picture(4).convert("L")).astype(np.uint16) * 257)
    buffer = BytesIO()
    Image.fromarray(clear).save(buffer, "PNG")
    encoded = base64.b64encode(buffer.getvalue()).decode()
    yield tmp_path / "turned.png", "image"
    yield str(tmp_path / "turned.png"), "path"
    yield Image.open(tmp_path / "turned.png"), "image"
    yield Image.fromarray(clear), "image"
    yield grey, "image"
    yield seen, "image"
    yield encoded, "base64"


@pytest.fixture
def processor(vlm):
    before = vlm.processor.chat_template
    vlm.processor.chat_template = TEMPLATE.replace("IMAGE", vlm.placeholder)
    yield vlm.processor
    vlm.processor.chat_template = before


@pytest.fixture(params=sorted(FAMILIES))
def vlm(request):
    return FAMILIES[request.param]()


def test_pictures_of_messages_are_those_of_every_command(vlm, processor, tmp_path):
    for source, key in strange(vlm, tmp_path):
        found = sample_inputs(messages(source, key), processor, 0)
        shown = source if key != "base64" else Image.open(BytesIO(base64.b64decode(source)))
        text = vlm.placeholder + "what"
        right = processor(text=[text], images=[[picture(shown)]], return_tensors="pt")
        assert torch.equal(found["pixel_values"], right["pixel_values"]), (source, key)
        told = sample_inputs({"text": [text], "images": [[shown]]}, processor, 0)
        assert torch.equal(told["pixel_values"], right["pixel_values"])
        assert (
            next(iter(prompts(vlm.model, processor, [messages(source, key)]))).layout.rows[0].num_images == 1
        )


def test_a_processor_of_ones_own_renders_text():
    vlm = FAMILIES["qwen2_5_vl"]()

    class Own:
        tokenizer = vlm.processor.tokenizer

        def apply_chat_template(self, messages, *, add_generation_prompt, tokenize):
            assert not tokenize
            return vlm.placeholder + messages[0]["content"][1]["text"]

        def __call__(self, text, images=None, **options):
            return vlm.processor(text=text, images=images, **options)

    samples = [messages(vlm.picture(seed)) for seed in range(3)]
    capsule = KVCapsule.fit(vlm.model, Own(), samples, codec="heads", progress=False)
    assert capsule.info.blocks >= 3


def test_what_is_no_sample_is_named():
    vlm = FAMILIES["qwen2_5_vl"]()
    for sample in (3, "text", [3], [{"role": "user"}], messages(None), messages("/nowhere.png")):
        with pytest.raises(CapsightError, match="sample 7"):
            sample_inputs(sample, vlm.processor, 7)
    with pytest.raises(CalibrationError, match="processor"):
        sample_inputs(messages(vlm.picture()), None, 7)
    with pytest.raises(OptionError, match="cannot read"):
        sample_inputs(messages("/nowhere.png"), vlm.processor, 7)
