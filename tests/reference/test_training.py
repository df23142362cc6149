from __future__ import annotations

import random

import pytest
import torch

from capsight.reference.architecture import build_config, build_model, build_processor, build_tokenizer
from capsight.reference.corpus import wording
from capsight.reference.drawing import draw_scene
from capsight.reference.prompts import split_prompt
from capsight.reference.training.batches import Batcher, patches
from capsight.reference.training.dense import CHARACTERS, SLOTS, dense_labels, text_page
from capsight.reference.training.feed import lesson
from capsight.reference.training.loop import Trainer
from capsight.reference.training.stages import Stage


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(wording(20))


def test_batches_are_what_processor_and_model_make(tokenizer):
    processor = build_processor(tokenizer)
    prompt = split_prompt("train", 3, 3, 4)
    batch = Batcher(tokenizer)([prompt])
    content = [{"type": "image"}] * 3 + [{"type": "text", "text": prompt.questions[0].text}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    expected = processor(text=[text], images=[s.image for s in prompt.scenes], return_tensors="pt")
    length = expected["input_ids"].shape[1]
    assert torch.equal(batch.input_ids[:, :length], expected["input_ids"])
    pixel_values, grid_thw = patches([s.image for s in prompt.scenes])
    assert torch.equal(pixel_values, expected["pixel_values"])
    assert torch.equal(grid_thw, expected["image_grid_thw"])
    model = build_model(build_config(tokenizer)).model
    positions, _ = model.get_rope_index(
        expected["input_ids"], expected["mm_token_type_ids"], expected["image_grid_thw"]
    )
    assert torch.equal(batch.position_ids[:, :, :length], positions)


def test_only_answers_are_learnt(tokenizer):
    prompts = [split_prompt("train", i, 1 + i, 3) for i in range(2)]
    batch = Batcher(tokenizer)(prompts)
    for row, prompt in enumerate(prompts):
        learnt = batch.labels[row][batch.labels[row] >= 0]
        text = tokenizer.decode(learnt)
        assert text == "".join(q.answer + "<|end|>" for q in prompt.questions)


def test_dense_labels_count_every_glyph_and_mark():
    page, shapes = text_page(random.Random(0)), draw_scene(random.Random(0), "shapes", 0.0)
    labels = dense_labels([page, shapes])
    assert labels.chars.shape == (128, SLOTS)
    glyphs = sum(g.char in CHARACTERS for g in page.glyphs)
    assert (labels.chars[:64] > 0).sum() == glyphs == len(page.glyphs)
    assert (labels.shapes[64:] > 0).sum() == len(shapes.marks)
    assert (labels.colors[:64] > 0).sum() == 0


def test_training_resumes_where_it_stopped(tokenizer, tmp_path, monkeypatch):
    stages = (Stage("see", 2, 2, (), 0.0, 1e-3, 0.0), Stage("read", 2, 2, (1,), 1e-3, 1e-4, 0.0))
    monkeypatch.setattr("capsight.reference.training.loop.STAGES", stages)

    def trainer(folder):
        torch.manual_seed(0)
        return Trainer(build_model(build_config(tokenizer)).train(), tokenizer, folder)

    whole = trainer(tmp_path / "whole")
    whole.run("read", every=1)
    first = trainer(tmp_path / "parts")
    first.run("see", every=1)
    second = trainer(tmp_path / "parts")
    assert second.resume()
    second.run("read", every=1)
    for a, b in zip(whole.model.parameters(), second.model.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_standardising_changes_what_the_language_model_gets_but_not_what_the_heads_say(tokenizer, tmp_path):
    torch.manual_seed(0)
    trainer = Trainer(build_model(build_config(tokenizer)), tokenizer, tmp_path)
    merger = trainer.model.model.visual.merger
    with torch.no_grad():
        for parameter in merger.parameters():
            parameter.mul_(5).add_(0.3)
    some = lesson(Stage("see", 1, 3, (), 0.0, 1e-3, 0.5), 0, trainer.batcher)

    def look():
        features = trainer._see(some.pixel_values, some.grid_thw)
        return features, trainer.heads(features, some.labels)[0]

    before, loss = look()
    trainer.standardise()
    after, same_loss = look()
    assert (loss - same_loss).abs() < 1e-3 * loss.abs()
    assert after.std() < 0.2 < before.abs().mean()
