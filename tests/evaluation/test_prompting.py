"""Questions and pictures that a processor cannot take end in one sentence, in every family."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import torch
from PIL import Image

from capsight.errors import CapsightError, OptionError
from capsight.evaluation import Ask, Item, ask_item
from capsight.evaluation.prompting import call, chat_text, process, render, vision_tokens
from capsight.layout import build_layout
from capsight.runtime import enable
from processors.checkpoints import EIGHT, template
from tiny import FAMILIES


@pytest.fixture(params=EIGHT)
def vlm(request):
    vlm = FAMILIES[request.param]()
    vlm.processor.chat_template = template(vlm)
    yield vlm
    vlm.processor.chat_template = None


def item(*images):
    return Item("data.jsonl, line 7", images, (Ask("what?", ""),))


def test_a_question_with_an_image_token(vlm):
    assert chat_text(vlm.processor, 1, "what?") == vlm.prompt([None], "what?")
    names = [n for n in ("image", "start", "end", "video", "fake") if n in vlm.special]
    texts = {vlm.special[name] for name in names} | {vlm.video_placeholder} - {""}
    for token in texts:
        with pytest.raises(OptionError, match="stands for an image"):
            process(vlm.processor, item(vlm.picture()), [f"what is {token}?"])
        with pytest.raises(OptionError, match="stands for an image"):
            render(vlm.processor, [{"role": "user", "content": f"a {token}"}])
    assert not {"?", ""} & vision_tokens(vlm.processor)


def test_a_question_with_an_image_token_is_told_with_its_line(vlm):
    item = Item("data.jsonl, line 3", (vlm.picture(),), ())
    with pytest.raises(OptionError, match=r"data\.jsonl, line 3: a question holds"):
        process(vlm.processor, item, [f"what is {vlm.special['image']}"])


@pytest.mark.parametrize("images", [1, 2])
def test_questions_over_a_cache_are_those_of_one_prefill(vlm, images):
    questions = ("what?", "\n\nand this?", " x", "")
    pictures = tuple(vlm.picture(seed) for seed in range(images))
    asked = Item("a", pictures, tuple(Ask(question, "") for question in questions))
    with enable(vlm.model) as fast, torch.no_grad():
        after, within = (ask_item(fast, vlm.processor, asked, p, 1) for p in ("after", "within"))
        for number, ask in enumerate(asked.asks):
            wanted = vlm.model(**process(vlm.processor, asked, [ask.question])).logits[0, -1]
            alone = ask_item(fast, vlm.processor, Item("a", pictures, (ask,)), "after", 1)
            assert torch.allclose(alone.first_logits[0], wanted, atol=1e-4), ask
            assert torch.allclose(within.first_logits[number], wanted, atol=1e-4), ask
            if vlm.name != "gemma3":  # padding between images and question takes from its sliding window
                assert torch.allclose(after.first_logits[number], wanted, atol=1e-4), ask


def test_no_chat_template(vlm):
    vlm.processor.chat_template = None
    with pytest.raises(OptionError, match="chat template"):
        chat_text(vlm.processor, 1, "what?")
    vlm.processor.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(OptionError, match="roles must alternate"):
        chat_text(vlm.processor, 1, "what?")
    vlm.processor.chat_template = "{% nonsense"
    with pytest.raises(OptionError, match="cannot write the prompt"):
        chat_text(vlm.processor, 1, "what?")


def test_every_kind_of_picture_gives_the_same_pixels(vlm):
    picture = vlm.picture(1)
    wanted = process(vlm.processor, item(picture), ["what?"])
    alpha = picture.convert("RGBA")
    turned = picture.transpose(Image.Transpose.ROTATE_90)
    turned.getexif()[0x0112] = 6
    values = np.asarray(picture)
    for other in (
        alpha,
        turned,
        values,
        torch.from_numpy(values.copy()),
        values.astype(np.uint16) * 257,
        values / 255,
    ):
        found = process(vlm.processor, item(other), ["what?"])
        assert set(found) == set(wanted)
        for name, value in wanted.items():
            assert torch.equal(torch.as_tensor(found[name]), torch.as_tensor(value)), name


@pytest.mark.parametrize("size", [(200, 1), (1, 200), (1, 1), (3, 3), (1, 3), (3, 1), (2, 300)])
def test_small_and_long_pictures_are_read_or_refused(vlm, size):
    with contextlib.suppress(CapsightError):
        inputs = process(vlm.processor, item(Image.new("RGB", size)), ["what?"])
        assert build_layout(inputs, vlm.config).num_images == 1


def test_pictures_that_a_family_refuses_name_the_line(vlm):
    with pytest.raises(OptionError, match="200 : 1"):
        process(vlm.processor, item(Image.new("RGB", (2010, 10))), ["what?"])
    if "qwen" in vlm.name:
        text = chat_text(vlm.processor, 1, "what?")
        with pytest.raises(OptionError, match=r"line 7: .* 2010 x 10 pixels: .*ratio"):
            call(vlm.processor, [text], [[Image.new("RGB", (2010, 10))]], "data.jsonl, line 7")
