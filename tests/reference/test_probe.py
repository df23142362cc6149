from __future__ import annotations

import random

import pytest
import torch

from capsight.reference.drawing import KINDS, draw_scene
from capsight.reference.prompts import ask_about
from reference_training.architecture import build_config, build_model, build_tokenizer
from reference_training.batches import Batcher
from reference_training.corpus import wording
from reference_training.probe import Probe


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(wording(20))


@pytest.fixture
def batch(tokenizer):
    rng = random.Random(1)
    scenes = [draw_scene(rng, kind, 0.3) for kind in KINDS]
    return scenes, Batcher(tokenizer)([ask_about(rng, scenes, 3, 0.4)])


def test_ends_are_the_closing_tokens_and_what_lies_on_the_images(tokenizer, batch):
    scenes, made = batch
    closing = tokenizer.convert_tokens_to_ids("<|vision_end|>")
    assert (made.input_ids[made.ends.row, made.ends.position] == closing).all()
    assert [KINDS[k] for k in made.ends.kind] == [s.kind for s in scenes]
    assert made.ends.marks.tolist() == [len(s.marks) for s in scenes]


def test_the_probe_learns_from_the_layer_it_listens_to(tokenizer, batch):
    torch.manual_seed(0)
    _, made = batch
    model = build_model(build_config(tokenizer)).model.language_model
    probe = Probe(model)
    embeds = (torch.randn(*made.input_ids.shape, 256) * 0.1).requires_grad_()
    model(inputs_embeds=embeds, position_ids=made.position_ids, use_cache=False)
    loss, shares = probe(made.ends)
    loss.backward()
    assert embeds.grad.abs().sum() > 0
    assert model.layers[3].mlp.down_proj.weight.grad is None
    assert all(0 <= share <= 1 for share in shares.values())
