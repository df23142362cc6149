"""Calls that go past `FastModel`: `model.generate`, pipelines and loops run on capsules, or are refused."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from transformers import pipeline
from transformers.cache_utils import DynamicCache

import capsight
from capsight.cache_argument import CACHE
from capsight.errors import CapsightError
from tiny import CACHES, in_turn

from .conftest import few, fitted
from .test_enable import assert_same, greedy, mixed_batch


@in_turn("codec", ["joint", "heads", "adaptive"])
def test_the_models_own_generate_uses_the_capsule(vlm, codec):
    inputs, caches = mixed_batch(vlm), []
    with capsight.enable(vlm.model, capsule=fitted(vlm.name, 0.4, codec)) as fast:
        expected = greedy(fast.generate, **inputs)
        for given in ({}, {CACHE: DynamicCache(config=vlm.config)}, {CACHE: DynamicCache()}):
            ours = greedy(vlm.model.generate, **given, **inputs)
            assert_same(ours, expected)
            caches.append(getattr(ours, CACHE))
    assert all(cache.nbytes < cache.nbytes_full for cache in caches)


@in_turn("codec", ["heads", "adaptive", "joint"])
def test_a_loop_of_ones_own_uses_the_capsule(vlm, codec):
    inputs = vlm.inputs([([vlm.picture(1), vlm.picture(2)], "compare them")])
    with capsight.enable(vlm.model, capsule=fitted(vlm.name, 0.4, codec)) as fast, torch.no_grad():
        expected = greedy(fast.generate, **inputs)
        output = vlm.model(**inputs, use_cache=True)
        new = expected.sequences[0, -len(expected.logits) :]
        for token, logits in zip(new, expected.logits, strict=True):
            torch.testing.assert_close(output.logits[:, -1], logits, atol=1e-4, rtol=0)
            output = vlm.model(input_ids=token[None, None], **{CACHE: getattr(output, CACHE)})


@in_turn("codec", ["heads", "joint", "adaptive"])
def test_the_part_below_the_head_uses_the_capsule(vlm, codec):
    inputs = vlm.inputs([([vlm.picture(1), vlm.picture(2)], "compare them")])
    below, head = vlm.model.base_model, vlm.model.get_output_embeddings()
    with torch.no_grad():
        prefilled = below(**inputs).last_hidden_state
    with capsight.enable(vlm.model, capsule=fitted(vlm.name, 0.4, codec)) as fast, torch.no_grad():
        expected = greedy(fast.generate, **inputs)
        output = below(**inputs, use_cache=True)
        torch.testing.assert_close(output.last_hidden_state, prefilled, atol=1e-4, rtol=0)
        cache, token = getattr(output, CACHE), expected.sequences[:, -len(expected.logits)]
        output = below(input_ids=token[:, None], **{CACHE: cache})
        assert cache.nbytes < cache.nbytes_full
        theirs = vlm.model.generate(**inputs, max_new_tokens=2, do_sample=False, output_hidden_states=True,
                                    return_dict_in_generate=True).hidden_states[1][-1]  # fmt: skip
        torch.testing.assert_close(head(output.last_hidden_state), head(theirs), atol=1e-4, rtol=0)


@few
def test_the_text_model_by_itself_is_told_to_know_no_images(vlm):
    inputs = vlm.inputs([([vlm.picture(1)], "compare them")])
    embedded = vlm.model.get_input_embeddings()(inputs["input_ids"]).detach()
    with capsight.enable(vlm.model, capsule=fitted(vlm.name, 0.4)) as fast, warnings.catch_warnings():
        warnings.simplefilter("error")
        fast.generate(**inputs, max_new_tokens=2)
        vlm.model(**inputs)
        with pytest.warns(UserWarning, match="on the full cache"):
            vlm.model.get_decoder()(inputs_embeds=embedded)


@in_turn("codec", ["adaptive", "joint", "heads"], CACHES)
def test_a_question_over_a_cache_by_the_models_own_generate(vlm, codec):
    inputs = mixed_batch(vlm)
    tokens = {k: v for k, v in inputs.items() if k in ("input_ids", "attention_mask")}
    with capsight.enable(vlm.model, capsule=fitted(vlm.name, 0.4, codec)) as fast:
        cache = fast.encapsulate(**inputs)
        expected = greedy(fast.generate, **{CACHE: copy.deepcopy(cache)}, **inputs)
        fast.generate(**vlm.inputs([([vlm.picture(7)], "another conversation")]), max_new_tokens=2)
        assert_same(greedy(vlm.model.generate, **{CACHE: cache}, **tokens), expected)


@in_turn("codec", ["joint", "heads"], CACHES)
def test_guessing_ahead_over_a_filled_cache_is_refused(vlm, codec):
    inputs = vlm.inputs([([vlm.picture(1)], "compare them")])
    tokens = {k: v for k, v in inputs.items() if k in ("input_ids", "attention_mask")}
    with capsight.enable(vlm.model, capsule=fitted(vlm.name, 0.4, codec)) as fast:
        cache = fast.encapsulate(**inputs)
        for call, prompt in ((fast.generate, inputs), (vlm.model.generate, tokens)):
            with pytest.raises(CapsightError, match=r"prompt_lookup"):
                call(**{CACHE: copy.deepcopy(cache)}, **prompt, prompt_lookup_num_tokens=2, max_new_tokens=4)


@in_turn("codec", ["heads", "joint"])
def test_guessing_ahead_from_the_start_is_the_same_or_refused(vlm, codec):
    inputs = vlm.inputs([([vlm.picture(1), vlm.picture(2)], "abcabcabcabcabc")])
    options = {"max_new_tokens": 8, "do_sample": False}
    image = vlm.token_id("image")
    options["suppress_tokens"] = [
        image
    ]  # random weights write them, and transformers then looks for an image
    with capsight.enable(vlm.model, capsule=fitted(vlm.name, 1.0, codec)) as fast:
        expected, refusals = fast.generate(**inputs, **options), []
        for call in (fast.generate, vlm.model.generate):
            try:
                found = call(**inputs, **options, prompt_lookup_num_tokens=2)
            except (CapsightError, ValueError) as error:
                refusals.append(str(error))
                continue
            assert torch.equal(found, expected)
    assert all("crop" in said or "not supported with stateful" in said for said in refusals)


@few
def test_the_answer_of_beams_is_no_turn_to_go_on_from(vlm):
    inputs = vlm.inputs([([vlm.picture(1)], "compare them")])
    tokens = {k: v for k, v in inputs.items() if k in ("input_ids", "attention_mask")}
    with capsight.enable(vlm.model, capsule=fitted(vlm.name, 0.4)) as fast:
        cache = fast.encapsulate(**inputs)
        images = cache.get_seq_length()
        answer = fast.generate(past_key_values=cache, **inputs, num_beams=2, max_new_tokens=3)
        later = {"input_ids": torch.cat([answer, answer[:, -4:]], 1)}
        with pytest.raises(CapsightError, match="beams"):
            fast.generate(past_key_values=cache, **later, max_new_tokens=1)
        with pytest.raises(CapsightError, match="beams"):
            fast.save("nowhere")
        cache.crop(images)
        with pytest.raises(CapsightError, match="holds 2 rows"):
            fast.generate(past_key_values=cache, **tokens, max_new_tokens=1)
        fast.generate(past_key_values=copy.deepcopy(cache), **tokens, num_beams=2, max_new_tokens=1)
        cache.batch_select_indices(torch.tensor([0]))
        again = greedy(fast.generate, past_key_values=cache, **tokens)
        assert_same(again, greedy(fast.generate, past_key_values=fast.encapsulate(**inputs), **inputs))


def test_as_many_answers_as_beams_are_no_turn_to_go_on_from_either(qwen):
    inputs = qwen.inputs([([qwen.picture(1)], "compare them")])
    with capsight.enable(qwen.model, capsule=fitted("qwen2_5_vl", 0.4)) as fast:
        answers = fast.generate(**inputs, num_beams=2, num_return_sequences=2, max_new_tokens=3)
        later = {"input_ids": torch.cat([answers, answers[:, -4:]], 1)}
        with pytest.raises(CapsightError, match="beams"):
            fast.generate(past_key_values=fast.cache, **later, max_new_tokens=1)


def test_a_pipeline_uses_the_capsule(vlm):
    processor = vlm.processor
    pipe = pipeline("image-text-to-text", model=vlm.model, processor=processor)
    pictures = [vlm.picture(1), vlm.picture(2)]
    with capsight.enable(vlm.model, capsule=fitted(vlm.name, 0.2, "heads")) as fast:
        options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
        prompt = vlm.prompt(pictures, "compare")
        inputs = processor(text=prompt, images=pictures, return_tensors="pt")
        expected = fast.generate(**inputs, **options)
        found = pipe(text=prompt, images=pictures, generate_kwargs=options, return_tensors=True)
        assert found[0]["generated_token_ids"].tolist() == expected[0].tolist()
