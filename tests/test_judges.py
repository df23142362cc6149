"""The judge `mosaic` answers its questions, and training saw what the real pipeline shows."""

import pytest
import torch

from capsight.evaluation import evaluate, summary
from capsight.evaluation.prompting import chat_text
from capsight.layout import build_layout
from judging.check import accuracy
from judging.lessons import Teacher
from judging.loader import judge_items, judge_prompt, load_judge
from judging.packed import Packed
from judging.shapes import JUDGES
from judging.train import answers, features_of


@pytest.fixture
def mosaic():
    torch.manual_seed(0)
    return load_judge("mosaic")


@torch.no_grad()
def test_packed_rows_are_what_the_processor_and_the_stock_attention_make(mosaic) -> None:
    model, processor = mosaic
    prompt = judge_prompt("mosaic", "calibration", 0, 2, questions=3)
    question = prompt.questions[0]
    inputs = processor(
        text=[chat_text(processor, 2, question.text)], images=[list(prompt.images)], return_tensors="pt"
    )
    stock = model(**inputs).logits[0, -1]
    teacher = Teacher(JUDGES["mosaic"], processor.tokenizer)
    lesson = teacher([prompt])
    assert torch.equal(lesson.prefix, inputs["input_ids"][0, : len(lesson.prefix)])
    assert build_layout(inputs, model.config).last_vision_end == len(lesson.prefix)
    Packed(model.model.language_model).begin(lesson, JUDGES["mosaic"].grid ** 2)
    logits, _, _ = answers(JUDGES["mosaic"], model, lesson, features_of(JUDGES["mosaic"], model, lesson))
    assert (logits[0] - stock).abs().max() < 1e-3


def test_the_judge_is_right(mosaic) -> None:
    model, processor = mosaic
    report = summary(
        evaluate(model, processor, judge_items("mosaic", "calibration", 2, 2), {}, max_new_tokens=48)
    )
    assert report["full"]["exact_match"] >= 90


def test_forced_answers_are_counted_right(mosaic) -> None:
    model, processor = mosaic
    found = accuracy(JUDGES["mosaic"], model, processor.tokenizer, "calibration", 2)
    for counts in found.values():
        right, asked = (sum(column) for column in zip(*counts.values(), strict=True))
        assert right / asked >= 0.9


def test_splits_share_no_prompt() -> None:
    drawn = {judge_prompt("mosaic", s, 0, 1).images[0].tobytes() for s in ("calibration", "dev", "test")}
    assert len(drawn) == 3
    again = judge_prompt("mosaic", "dev", 0, 1).images[0].tobytes()
    assert again == judge_prompt("mosaic", "dev", 0, 1).images[0].tobytes()
    assert again in drawn
