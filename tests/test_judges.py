"""The judges answer their questions, and training saw what the real pipeline shows."""

import pytest
import torch

from capsight.evaluation import evaluate, summary
from capsight.evaluation.prompting import chat_text
from capsight.layout import build_layout
from judging.check import accuracy
from judging.dense import labels_of
from judging.lessons import Teacher
from judging.loader import judge_items, judge_prompt, load_judge
from judging.packed import Packed
from judging.shapes import JUDGES
from judging.train import answers, features_of
from judging.world import Thing, World

#: The least share of right answers with the full cache, of few questions.
RIGHT = {"mosaic": 0.9, "wide": 0.8}


@pytest.fixture(params=RIGHT)
def judge(request):
    torch.manual_seed(0)
    return request.param, *load_judge(request.param)


@torch.no_grad()
def test_packed_rows_are_what_the_processor_and_the_stock_attention_make(judge) -> None:
    name, model, processor = judge
    prompt = judge_prompt(name, "calibration", 0, 2, questions=3)
    question = prompt.questions[0]
    inputs = processor(
        text=[chat_text(processor, 2, question.text)], images=[list(prompt.images)], return_tensors="pt"
    )
    stock = model(**inputs).logits[0, -1]
    teacher = Teacher(JUDGES[name], processor.tokenizer)
    lesson = teacher([prompt])
    assert torch.equal(lesson.prefix, inputs["input_ids"][0, : len(lesson.prefix)])
    after = {"mosaic": 0, "wide": 1}[name]  # LLaVA knows of no token that ends a picture
    assert build_layout(inputs, model.config).last_vision_end + after == len(lesson.prefix)
    Packed(model.model.language_model).begin(lesson, JUDGES[name].tokens)
    logits, _, _ = answers(JUDGES[name], model, lesson, features_of(JUDGES[name], model, lesson))
    assert (logits[0] - stock).abs().max() < 1e-3


def test_the_judge_is_right(judge) -> None:
    name, model, processor = judge
    report = summary(
        evaluate(model, processor, judge_items(name, "calibration", 2, 2), {}, max_new_tokens=48)
    )
    assert report["full"]["exact_match"] >= 100 * RIGHT[name]


def test_forced_answers_are_counted_right(judge) -> None:
    name, model, processor = judge
    found = accuracy(JUDGES[name], model, processor.tokenizer, "calibration", 2)
    for counts in found.values():
        right, asked = (sum(column) for column in zip(*counts.values(), strict=True))
        assert right / asked >= RIGHT[name]


def test_splits_share_no_prompt() -> None:
    drawn = {judge_prompt("mosaic", s, 0, 1).images[0].tobytes() for s in ("calibration", "dev", "test")}
    assert len(drawn) == 3
    again = judge_prompt("mosaic", "dev", 0, 1).images[0].tobytes()
    assert again == judge_prompt("mosaic", "dev", 0, 1).images[0].tobytes()
    assert again in drawn


def test_cells_of_four_tokens_share_a_picture_out_among_themselves() -> None:
    wide = JUDGES["wide"]
    assert wide.tokens_of(0) == [0, 1, 16, 17]
    assert sorted(t for cell in range(64) for t in wide.tokens_of(cell)) == list(range(wide.tokens))


def test_each_digit_is_asked_where_it_lies() -> None:
    world = World(8, "red", "plain", "day", {(1, 2): Thing("blue", number="47")}, "")
    labels = labels_of([world], 2).by_name
    first, second, third, fourth = JUDGES["wide"].tokens_of(10)
    assert labels["tens"].nonzero().flatten().tolist() == [first, third]
    assert labels["ones"].nonzero().flatten().tolist() == [second, fourth]
    assert labels["tens"][first] == 5
    assert labels["ones"][fourth] == 8
