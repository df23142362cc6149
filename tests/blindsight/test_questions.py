"""Questions read over images that were read once, against rows that hold both; and counting of changes."""

import pytest
import torch

from capsight.blindsight import Category, HeadMap, HeldOut, MaskOptions, Prompt, Questions
from capsight.blindsight.calibrate import held_out
from capsight.blindsight.calibrate.answers import Answers
from capsight.blindsight.calibrate.capture import shape_of
from capsight.blindsight.calibrate.questions import QuestionAnswers
from capsight.layout import build_layout
from capsight.runtime.split import first_tokens
from tiny import FAMILIES, KINDS

OPTIONS = MaskOptions(False, 0, 1)


def asked(vlm, questions=("hi?", "what is it", "a longer question")):
    """The same questions as one batch of whole prompts, and after the images."""
    pictures = [vlm.picture(i) for i in range(2)]
    rows = [dict(vlm.inputs([(pictures, text)])) for text in questions]
    layouts = [build_layout(row, vlm.config) for row in rows]
    end = layouts[0].last_vision_end
    images = Prompt(first_tokens(rows[0], end), layouts[0].prefix(end))
    tails = tuple(tuple(row["input_ids"][0, end:].tolist()) for row in rows)
    return [Prompt(row, layout) for row, layout in zip(rows, layouts, strict=True)], Questions(images, tails)


@pytest.mark.parametrize("family", KINDS)
def test_questions_after_images_are_answered_as_whole_prompts(family):
    vlm = FAMILIES[family]()
    prompts, questions = asked(vlm)
    size = shape_of(vlm.model)
    together = QuestionAnswers(vlm.model, questions, 3)
    alone = [Answers(vlm.model, prompt, 3) for prompt in prompts]
    assert together.counted.sum(-1).tolist() == [int(answers.counted.sum()) for answers in alone]
    assert together.kl(HeadMap.all_dense(*size)).abs().max() < 1e-6
    for category in (Category.SINK, Category.INTRA_IMAGE):
        head_map = HeadMap.uniform(category, *size, OPTIONS)
        found = together.read(head_map)
        for row, answers in zip(found, alone, strict=True):
            expected = answers.read(head_map)[0]
            assert torch.allclose(row[: len(expected)], expected, atol=1e-3)
    assert together.kl(head_map).max() > 1e-6


def test_held_out_questions_count_like_rows():
    vlm = FAMILIES["qwen2_5_vl"]()
    prompts, questions = asked(vlm)
    rows, together = HeldOut(vlm.model, prompts), HeldOut(vlm.model, [questions])
    for category in Category:
        head_map = HeadMap.uniform(category, *shape_of(vlm.model), OPTIONS)
        assert together.changed(head_map) == rows.changed(head_map)
        assert together.kl(head_map) == pytest.approx(rows.kl(head_map), abs=1e-5)


def test_counting_stops_where_the_map_has_failed(monkeypatch):
    """Prompts that changed come first the next time; a map that is within the limit is counted in full."""
    read: list[int] = []

    class Told:
        counted = torch.ones(2, 3, dtype=torch.bool)

        def __init__(self, model, prompt, new_tokens):
            self.place = prompt

        def changed(self, changes):
            read.append(self.place)
            return torch.arange(2) < changes[self.place]

    monkeypatch.setattr(held_out, "Answers", Told)
    held = HeldOut(None, range(5))
    assert held.changed([0, 0, 1, 2, 0], 0.2) == 0.3
    assert read == [0, 1, 2, 3]
    read.clear()
    assert held.changed([0, 0, 1, 2, 0], 0.2) == 0.3
    assert read == [3, 2]
    assert held.changed([0, 0, 0, 2, 0], 0.2) == 0.2
    assert held.changed([1, 0, 1, 2, 2]) == 0.6
