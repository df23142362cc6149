"""Answers of the dense model, read over under head maps, against answers that are really written."""

import pytest
import torch

import capsight
from capsight.blindsight import Category, HeadMap, MaskOptions, Prompt
from capsight.blindsight.calibrate.answers import Answers, TextPart, _until_end
from capsight.blindsight.calibrate.capture import shape_of
from capsight.layout import build_layout
from tiny import FAMILIES, KINDS


def prompt(vlm):
    """Two rows, one left-padded."""
    pictures = [vlm.picture(i) for i in range(3)]
    inputs = dict(vlm.inputs([(pictures[:1], "hi?"), (pictures[1:], "what is it")]))
    return Prompt(inputs, build_layout(inputs, vlm.config))


@pytest.mark.parametrize("family", KINDS)
def test_the_text_part_is_the_model_under_every_map(family):
    """Run apart from the vision tower, in every family, as the whole model says; masks of all rules."""
    vlm = FAMILIES[family]()
    given = prompt(vlm)
    text = TextPart(vlm.model, given.inputs, given.layout)
    size = shape_of(vlm.model)
    with torch.no_grad():
        plain = vlm.model(**given.inputs, use_cache=False).logits[:, -3:].log_softmax(-1)
    assert torch.allclose(text.logits(HeadMap.all_dense(*size), 3).log_softmax(-1), plain, atol=1e-4)
    sink = HeadMap.uniform(Category.SINK, *size, MaskOptions(False, 0, 1))
    with capsight.enable(vlm.model, head_map=sink, prefill="sparse") as fast:
        out = fast.generate(
            **given.inputs,
            max_new_tokens=1,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    found = text.logits(sink, 1)[:, 0].log_softmax(-1)
    assert torch.allclose(found, out.logits[0].log_softmax(-1), atol=1e-4)
    assert not torch.allclose(found[1], plain[1, -1], atol=1e-4)


def test_changed_answers_are_those_that_would_be_written():
    vlm = FAMILIES["qwen2_5_vl"]()
    given = prompt(vlm)
    answers = Answers(vlm.model, given, new_tokens=4)
    vision = vlm.config.image_token_id
    written = {}
    dense = HeadMap.all_dense(*shape_of(vlm.model))
    maps = [dense, *(HeadMap.uniform(c, 3, 4, MaskOptions(False, 0, 1)) for c in list(Category)[1:])]
    for head_map in maps:
        with capsight.enable(vlm.model, head_map=head_map, prefill="sparse") as fast:
            out = fast.generate(**given.inputs, max_new_tokens=4, do_sample=False, suppress_tokens=[vision])
        written[head_map] = out[:, given.inputs["input_ids"].shape[1] :]
    for head_map in maps:
        same = [torch.equal(a, b) for a, b in zip(written[head_map], written[dense], strict=True)]
        assert answers.changed(head_map).tolist() == [not s for s in same]
    assert answers.kl(dense).abs().max() < 1e-6
    assert answers.kl(maps[1])[1] > 0


def test_answers_count_up_to_their_end():
    tokens = torch.tensor([[5, 9, 3, 9], [9, 4, 4, 4], [1, 2, 3, 4]])
    counted = [[True, True, False, False], [True, False, False, False], [True] * 4]
    assert _until_end(tokens, [9]).tolist() == counted
    assert _until_end(tokens, [8, 9]).tolist() == counted
    assert _until_end(tokens, []).all()
