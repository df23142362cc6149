from __future__ import annotations

import random

import pytest
import torch

from capsight.reference.drawing import KINDS, draw_scene
from capsight.reference.drawing.canvas import CELL
from capsight.reference.prompts import ask_about, draw_prompt, split_rng
from capsight.reference.questions import TASKS
from reference_training.architecture import build_config, build_model, build_tokenizer
from reference_training.batches import Batcher
from reference_training.corpus import wording
from reference_training.evidence import END, NUMBER, START, bindings, evidence
from reference_training.pointing import SLOTS, Pointing


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(wording(20))


def _asked():
    """Prompts until every task has been asked."""
    missing, index = set(TASKS), 0
    while missing:
        prompt = draw_prompt(split_rng("train", index, "evidence"), 1 + index % 8, 24, 0.3)
        missing -= {q.task for q in prompt.questions}
        index += 1
        yield prompt


def _characters(prompt, place):
    scene = prompt.scenes[place[0]]
    columns = scene.image.width // CELL
    return {g.char for g in scene.glyphs if int(g.y // CELL) * columns + int(g.x // CELL) == place[1]}


READ = {"read_code", "small_print", "price", "total", "cell", "bar_height", "plate"}


def test_evidence_holds_the_answer():
    for prompt in _asked():
        ends = [(image, END) for image in range(len(prompt.scenes))]
        for question in prompt.questions:
            looks = evidence(prompt, question)
            assert looks
            assert all(one and two for one, two in looks)
            for one, two in looks:
                for image, cell in (*one, *two):
                    assert (image, cell) == START or 0 <= image < len(prompt.scenes)
                    assert cell >= NUMBER
            if question.task in READ:  # the very character is drawn where the heads should look
                assert len(looks) == len(question.answer)
                for char, (one, _) in zip(question.answer, looks, strict=True):
                    assert char in _characters(prompt, one[0])
            elif question.task == "order":
                assert len(looks) == len(question.answer)
                assert [
                    k for k, ((image, cell),) in enumerate([one for one, _ in looks]) if cell != END
                ] == []
            elif question.task == "find":
                assert {image for one, _ in looks for image, _ in one} == {int(question.answer) - 1}
            elif question.task == "odd_one_out":
                assert looks == [(ends, [(int(question.answer) - 1, END)])]
            elif question.task == "count_shapes":
                assert len(set(looks[0][0])) == int(question.answer) + 1
            elif question.task == "count_images":  # the counted and the place beside them; and all there is
                assert len(set(looks[0][1])) == int(question.answer) + 1
                assert looks[0][0] == [START, *ends]


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_value_is_about_comes_before_it(kind):
    rng = random.Random(7)
    for _ in range(20):
        scene = draw_scene(rng, kind, 0.3)
        for cell, rows, columns in bindings(scene):
            assert rows
            assert columns
            assert max(*rows, *columns) < cell


def test_targets_lie_in_the_past_and_add_up_to_one(tokenizer):
    rng = random.Random(3)
    scenes = [draw_scene(rng, kind, 0.3) for kind in KINDS]
    odd = [draw_scene(rng, kind, 0.0) for kind in ("card", "card", "chart")]
    asked = (scenes, 20, 0.4), (scenes[:3], 6, 0.4), (odd, 20, 1.0)
    batch = Batcher(tokenizer)([ask_about(rng, *one) for one in asked])
    assert set(batch.targets) == set(SLOTS)
    for target in batch.targets.values():
        at = target.queries[target.row, target.query]
        assert (target.key <= at).all()
        total = torch.zeros(target.queries.shape).index_put_(
            (target.row, target.query), target.weight, accumulate=True
        )
        assert torch.allclose(total[total > 0], torch.ones(()))
        pads = batch.input_ids == tokenizer.pad_token_id
        assert not pads[target.row, target.key].any()


def test_answers_say_which_token_they_predict(tokenizer):
    rng = random.Random(5)
    prompt = ask_about(rng, [draw_scene(rng, "plate", 0.0)], 1, 0.0)
    batch = Batcher(tokenizer)([prompt])
    target = batch.targets["text"]
    answers = (batch.labels[0] >= 0).nonzero()[:-1, 0]  # without the closing token
    assert target.queries[0].tolist() == answers.tolist()


def test_pointing_measures_attention_and_changes_nothing(tokenizer):
    torch.manual_seed(0)
    model = build_model(build_config(tokenizer)).eval().model.language_model
    rng = random.Random(9)
    batch = Batcher(tokenizer)([ask_about(rng, [draw_scene(rng, k, 0.0) for k in ("card", "chart")], 4, 0.3)])
    embeds = torch.randn(*batch.input_ids.shape, 256) * 0.1
    model.set_attn_implementation("eager")
    eager = model(inputs_embeds=embeds, position_ids=batch.position_ids, output_attentions=True)
    pointing = Pointing(model)
    pointing.begin(batch.targets)
    plain = model(inputs_embeds=embeds, position_ids=batch.position_ids, use_cache=False)
    assert torch.allclose(eager.last_hidden_state, plain.last_hidden_state, atol=1e-4)
    loss, shares = pointing.loss()
    expected = 0.0
    for name, target in batch.targets.items():
        for layer, head in SLOTS[name]:
            attention = eager.attentions[layer][:, head]
            at = target.queries[target.row, target.query]
            chances = attention[target.row, at, target.key].log()
            expected -= (chances * target.weight).sum() / target.weight.sum()
    assert abs(loss.item() - expected.item()) < 1e-3
    assert {"number", "label", "page", "text", "first"} <= set(shares) == set(batch.targets)
    assert all(0 < share < 1 for share in shares.values())
