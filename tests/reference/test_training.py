from __future__ import annotations

import random

import pytest
import torch

from capsight.reference.drawing import draw_scene
from capsight.reference.prompts import split_prompt
from reference_training.architecture import build_config, build_model, build_processor, build_tokenizer
from reference_training.batches import Batcher, patches
from reference_training.corpus import wording
from reference_training.dense import CHARACTERS, SLOTS, dense_labels, text_page
from reference_training.feed import lesson
from reference_training.loop import Trainer
from reference_training.muon import Muon
from reference_training.stages import STAGES, Stage, prompts


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


def test_dense_labels_say_what_text_is_about():
    card = draw_scene(random.Random(4), "card", 0.0)
    labels = dense_labels([card])
    words = {(w.x, w.y) for w in card.words}
    codes = {(g.x // 28, g.y // 28) for g in card.glyphs}
    assert (labels.abouts > 0).sum() == len(words) + len(codes)
    assert len(set(labels.abouts.tolist()) - {0}) == len(card.facts["codes"]) + 1  # and the small print


def test_training_resumes_where_it_stopped(tokenizer, tmp_path, monkeypatch):
    stages = (
        Stage("see", 2, 2, (), 1e-3, 1e-3, 0.0, vision=1.0),
        Stage("read", 2, 2, (1,), 1e-3, 1e-4, 0.0, pointing=0.2, vision=0.1),
    )
    monkeypatch.setattr("reference_training.loop.STAGES", stages)

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
    some = lesson(Stage("see", 1, 3, (), 1e-3, 1e-3, 0.5, vision=1.0), 0, trainer.batcher)

    def look():
        features = trainer._see(some.pixel_values, some.grid_thw)
        return features, trainer.heads(features, some.labels)[0]

    before, loss = look()
    trainer.standardise()
    after, same_loss = look()
    assert (loss - same_loss).abs() < 1e-3 * loss.abs()
    assert after.std() < 0.2 < before.abs().mean()


@pytest.mark.parametrize("stage", [s for s in STAGES if s.counts], ids=lambda stage: stage.name)
def test_lessons_have_the_images_of_their_stage(stage):
    made = prompts(stage, 3)
    count = len(made[0].scenes)
    assert count in stage.counts
    assert len(made) == max(1, stage.images // count)


def test_drills_ask_for_every_count_and_right():
    drill, counts = STAGES[-1], 0
    assert drill.counting
    for step in range(6):
        for prompt in prompts(drill, step):
            texts = [q.text for q in prompt.questions]
            assert len(set(texts)) == len(texts)
            for question in prompt.questions:
                if question.task == "count_images":
                    kind = question.text.split()[-2 if question.text.endswith("pages?") else -1]
                    kinds = [s.kind for s in prompt.scenes]
                    assert int(question.answer) == sum(k.startswith(kind.rstrip("s?")) for k in kinds)
                    counts += 1
                elif question.task == "count_shapes":
                    page = prompt.scenes[int(question.text.split(":")[0].split()[1]) - 1]
                    assert int(question.answer) == len(page.facts["shapes"])
                    counts += 1
    assert counts > 50


def test_muon_is_that_of_torch():
    torch.manual_seed(0)
    shapes = [(64, 32), (64, 32), (32, 64), (40, 40)]
    ours = [torch.nn.Parameter(torch.randn(s)) for s in shapes]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    start = [p.detach().clone() for p in ours]
    mine = Muon([{"params": ours}], lr=1e-2, weight_decay=0.02)
    stock = torch.optim.Muon(theirs, lr=1e-2, weight_decay=0.02, adjust_lr_fn="match_rms_adamw", ns_steps=5)
    for _ in range(3):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        mine.step()
        stock.step()
    for p, q, before in zip(ours, theirs, start, strict=True):  # torch's iterations are in bfloat16
        assert (p - q).norm() < 0.05 * (p - before).norm()
