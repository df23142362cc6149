"""The twin of the engine's capsules for transformers."""

from __future__ import annotations

import pytest
import torch

import capsight
from capsight.layout import build_layout
from capsight.reference import load_reference_vlm, split_prompt
from capsight.serving.method import PagedCapsules


@pytest.fixture(scope="module")
def vlm():
    return load_reference_vlm()


def inputs(processor, counts):
    prompts = [split_prompt("test", number, count) for number, count in enumerate(counts)]
    texts = [
        processor.apply_chat_template(
            [
                {
                    "role": "user",
                    "content": [{"type": "image"}] * count + [{"type": "text", "text": "How many?"}],
                }
            ],
            add_generation_prompt=True,
            tokenize=False,
        )
        for count in counts
    ]
    images = [[scene.image for scene in prompt.scenes] for prompt in prompts]
    return processor(text=texts, images=images, padding=True, padding_side="left", return_tensors="pt")


def answer(model, batch, capsule):
    with torch.no_grad(), capsight.enable(model, capsule=capsule) as fast:
        out = fast.generate(
            **batch, max_new_tokens=6, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
    return out.sequences[:, batch["input_ids"].shape[1] :], torch.stack(out.logits, 1)


def test_rows_of_a_batch_are_those_of_one(vlm):
    model, processor = vlm
    batch = inputs(processor, (1, 3))
    tokens, logits = answer(model, batch, PagedCapsules(0.3))
    for row, count in enumerate((1, 3)):
        prompt = split_prompt("test", row, count)
        text = processor.apply_chat_template(
            [
                {
                    "role": "user",
                    "content": [{"type": "image"}] * count + [{"type": "text", "text": "How many?"}],
                }
            ],
            add_generation_prompt=True,
            tokenize=False,
        )
        one = processor(text=[text], images=[[s.image for s in prompt.scenes]], return_tensors="pt")
        alone, alone_logits = answer(model, one, PagedCapsules(0.3))
        assert torch.equal(tokens[row, : alone.shape[1]], alone[0])
        assert torch.allclose(logits[row, : alone.shape[1]], alone_logits[0], atol=1e-3)


def test_everything_kept_is_the_full_cache(vlm):
    model, processor = vlm
    batch = inputs(processor, (2,))
    kept, full = (answer(model, batch, capsule) for capsule in (PagedCapsules(1.0), None))
    assert torch.equal(kept[0], full[0])
    assert torch.allclose(kept[1], full[1], atol=1e-4)


def test_every_head_keeps_as_many_as_its_blocks_hold(vlm):
    model, processor = vlm
    batch = inputs(processor, (3,))
    method = PagedCapsules(0.2)
    row = build_layout(batch, model.config).rows[0]
    plan = method.plan(row)
    assert plan is not None
    left = sum(block.num_tokens for block in row.blocks) - plan.image_tokens  # in a block that is not full
    with torch.no_grad(), capsight.enable(model, capsule=method) as fast:
        cache = fast.encapsulate(**batch)
    for layer in cache.capsule_layers.values():
        assert (layer.payload.tensors["counts"].sum(0) == plan.kept_image_tokens + left).all()
