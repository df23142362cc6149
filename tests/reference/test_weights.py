from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForImageTextToText

import capsight
from capsight.evaluation import ask_item, exact_match, reference_items
from capsight.reference import reference_path
from capsight.runtime import enable


@pytest.fixture(scope="module")
def reference():
    return capsight.load_reference_vlm()


def test_loads_offline_and_by_the_auto_class(reference, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model, processor = reference
    other = AutoModelForImageTextToText.from_pretrained(reference_path(), dtype=torch.float32)
    assert type(other) is type(model)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
    assert processor.tokenizer.padding_side == "left"


def test_ships_within_32_mb():
    files = [f for f in reference_path().rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) <= 32e6
    assert {f.suffix for f in files} <= {".safetensors", ".json", ".jinja", ".md"}


#: What the weights that ship reach, at the least, on 48 questions (see docs/reference-vlm.md).
BAR = 0.95


def test_answers_at_least_what_the_card_says(reference):
    model, processor = reference
    right = []
    with enable(model) as fast:
        for item in reference_items("calibration", 4, 8):
            answers = ask_item(fast, processor, item, "within")
            right += [exact_match(t, a.answer) for t, a in zip(answers.texts, item.asks, strict=True)]
    assert sum(right) / len(right) >= BAR


def test_image_content_matters(reference):
    model, processor = reference
    item = next(iter(reference_items("calibration", 1, 1)))
    blank = type(item)("blank", (item.images[0].point(lambda _: 255),), item.asks)
    with enable(model) as fast:
        seen, unseen = (ask_item(fast, processor, i, "within").first_logits for i in (item, blank))
    assert (seen - unseen).abs().max() > 1


def test_no_file_says_where_it_was_made():
    for file in reference_path().rglob("*.json"):
        assert "_name_or_path" not in file.read_text()
