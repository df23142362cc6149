"""`model.generate` on unpatched tiny models of every family, capsules against the stock cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache, TextStreamer

from capsight.kvcapsule import CapsulePlan, KVCapsule
from capsight.layout import build_layout
from kvcapsule.conftest import BLOCK, few, fitted
from tiny import CACHES, FAMILIES, TinyVLM, in_turn

NEW = 6


def batch(vlm: TinyVLM) -> Any:
    """Three left-padded rows: two images side by side, one image, none."""
    pictures = [vlm.picture(0), vlm.picture(1, vlm.other_size)]
    return vlm.inputs([(pictures, "what do you see here?"), ([vlm.picture(2)], "hi"), ([], "only text")])


def run(vlm: TinyVLM, inputs: Any, cache: Any, **options: Any) -> Any:
    options = {"max_new_tokens": NEW, "do_sample": False, **options}
    return vlm.model.generate(
        **inputs, past_key_values=cache, output_logits=True, return_dict_in_generate=True, **options
    )


def full_cache(vlm: TinyVLM) -> DynamicCache:
    return DynamicCache(config=vlm.model.config)


def assert_same(a: Any, b: Any) -> None:
    assert torch.equal(a.sequences, b.sequences)
    for x, y in zip(a.logits, b.logits, strict=True):
        torch.testing.assert_close(x, y, atol=1e-4, rtol=0)


def later_turn(sequences: torch.Tensor, inputs: Any) -> dict[str, torch.Tensor]:
    """Text-only inputs of a later turn; the images are in the cache and must not be given again."""
    new = sequences.shape[1] - inputs["input_ids"].shape[1]
    return {
        "input_ids": sequences,
        "attention_mask": torch.nn.functional.pad(inputs["attention_mask"], (0, new), value=1),
    }


def asked(vlm: TinyVLM, sequences: torch.Tensor, text: str) -> torch.Tensor:
    """All rows so far with `text` after them."""
    ids = torch.tensor([vlm.processor.tokenizer(text, add_special_tokens=False)["input_ids"]])
    return torch.cat([sequences, ids.expand(len(sequences), -1)], 1)


@in_turn("codec", ["adaptive", "static", "heads"], [*CACHES, "idefics3", "llava"])
def test_retaining_everything_is_the_full_cache(vlm, codec):
    inputs = batch(vlm)
    capsule = fitted(vlm, 1.0, codec=codec)
    cache = capsule.cache(inputs)
    assert_same(run(vlm, inputs, full_cache(vlm)), run(vlm, inputs, cache))
    plan = CapsulePlan.from_layout(build_layout(inputs, vlm.config), BLOCK)
    assert len(plan.runs) >= 8
    for layer in cache.capsule_layers.values():
        assert layer.placement.runs == plan.runs


@few
def test_a_second_turn_on_the_same_cache(vlm):
    inputs = batch(vlm)
    full, cache = full_cache(vlm), fitted(vlm, 1.0).cache(inputs)
    first = run(vlm, inputs, full, min_new_tokens=NEW)
    assert_same(first, run(vlm, inputs, cache, min_new_tokens=NEW))
    again = later_turn(asked(vlm, first.sequences, "and now?"), inputs)
    before = cache.get_seq_length()
    assert_same(run(vlm, again, full), run(vlm, again, cache))
    assert before >= inputs["input_ids"].shape[1] + NEW - 1


@in_turn("codec", ["static", "adaptive"])
def test_fewer_tokens_change_logits_a_little_and_bytes_a_lot(vlm, codec):
    inputs = batch(vlm)
    capsule = fitted(vlm, 0.4, codec=codec)
    cache = capsule.cache(inputs)
    a, b = run(vlm, inputs, full_cache(vlm), min_new_tokens=NEW), run(vlm, inputs, cache, min_new_tokens=NEW)
    torch.testing.assert_close(a.logits[0], b.logits[0], atol=1e-4, rtol=0)  # the prefill is exact
    assert not torch.equal(a.logits[1], b.logits[1])
    assert cache.nbytes < cache.nbytes_full
    # independent count: capsules, exact tokens, index tensors, sliding layers
    plan = CapsulePlan.from_layout(build_layout(inputs, vlm.config), BLOCK)
    expected, runs, exact = 0, len(plan.runs), plan.real_tokens(cache.get_seq_length()) - plan.capsule_tokens
    for layer in capsule.info.layers:
        token = 2 * layer.heads * layer.head_dim * 4
        expected += exact * token + runs * round(0.4 * BLOCK) * (token + (codec == "adaptive"))
    for layer in cache.layers:
        if getattr(layer, "is_sliding", False):
            expected += layer.keys.nbytes + layer.values.nbytes
    generated = len(plan.pads) * (cache.get_seq_length() - inputs["input_ids"].shape[1])
    expected += cache.state_nbytes
    assert cache.nbytes == expected + 16 * (runs + exact - generated)


@few
def test_protocol_after_question_over_capsules_equals_one_prefill_at_full_retention(vlm):
    inputs = vlm.inputs([([vlm.picture(0), vlm.picture(1)], "how many?")])
    capsule, cut = fitted(vlm, 1.0), build_layout(inputs, vlm.config).last_vision_end
    cache = capsule.cache(inputs)
    images = {
        name: value[:, :cut] if name in ("input_ids", "attention_mask") or "type_ids" in name else value
        for name, value in inputs.items()
    }
    with torch.no_grad():
        vlm.model(**images, past_key_values=cache, use_cache=True)
    assert cache.get_seq_length() == cut
    assert all(layer.payload is not None for layer in cache.capsule_layers.values())
    question = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    assert_same(run(vlm, inputs, full_cache(vlm)), run(vlm, question, cache))


def test_crop_back_to_the_images_and_ask_again(qwen):
    inputs = qwen.inputs([([qwen.picture(0)], "what is this?")])
    capsule = fitted(qwen, 0.4)
    cache, prompt = capsule.cache(inputs), inputs["input_ids"].shape[1]
    run(qwen, inputs, cache)
    one = later_turn(asked(qwen, inputs["input_ids"], "again?"), inputs)
    cache.crop(prompt)
    a = run(qwen, one, cache)
    cache.crop(prompt)
    assert_same(a, run(qwen, one, cache))


def test_a_second_turn_with_a_new_image(qwen):
    first = qwen.inputs([([qwen.picture(0)], "what is this?")])
    texts = [qwen.prompt([qwen.picture(0)], "what is this?") + qwen.prompt([qwen.picture(1)], "and this?")]
    both = qwen.process(texts, [[qwen.picture(0), qwen.picture(1)]])
    full, cache = full_cache(qwen), fitted(qwen, 1.0).cache(first)
    with torch.no_grad():
        for past in (full, cache):
            qwen.model(**first, past_key_values=past, use_cache=True)
    cache.extend_layout(build_layout(both, qwen.config))
    cut = first["input_ids"].shape[1]
    new = {"input_ids": both["input_ids"][:, cut:], "attention_mask": both["attention_mask"]}
    patches = int(both["image_grid_thw"][0].prod())
    new["mm_token_type_ids"] = both["mm_token_type_ids"][:, cut:]
    positions, _ = qwen.model.model.get_rope_index(
        both["input_ids"], both["mm_token_type_ids"], both["image_grid_thw"], None
    )
    new["position_ids"] = positions[..., cut:]
    new |= {"pixel_values": both["pixel_values"][patches:], "image_grid_thw": both["image_grid_thw"][1:]}
    with torch.no_grad():
        logits = [qwen.model(**new, past_key_values=past, use_cache=True).logits for past in (full, cache)]
    torch.testing.assert_close(*logits, atol=1e-4, rtol=0)
    assert len(cache.capsule_layers[0].placement.runs) == 2 * 64 // BLOCK


@pytest.mark.parametrize("name", ["qwen2_5_vl", "gemma3"])
def test_beams_and_several_sequences(name):
    vlm = FAMILIES[name]()
    inputs, capsule = batch(vlm), fitted(vlm, 1.0)
    for options in ({"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}):
        a = run(vlm, inputs, full_cache(vlm), **options)
        assert torch.equal(a.sequences, run(vlm, inputs, capsule.cache(inputs), **options).sequences)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "gemma3"])
def test_sampling_and_several_samples(name):
    vlm = FAMILIES[name]()
    inputs, capsule = batch(vlm), fitted(vlm, 1.0)
    found = []
    for cache in (full_cache(vlm), capsule.cache(inputs)):
        torch.manual_seed(0)
        found.append(run(vlm, inputs, cache, do_sample=True, num_return_sequences=2).sequences)
    assert torch.equal(*found)


def test_streaming(qwen, capsys):
    inputs = qwen.inputs([([qwen.picture(0)], "what is this?")])
    tokenizer = qwen.processor.tokenizer
    texts = []
    for cache in (full_cache(qwen), fitted(qwen, 1.0).cache(inputs)):
        run(qwen, inputs, cache, streamer=TextStreamer(tokenizer, skip_prompt=True))
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]


def test_chunked_prefill(qwen):
    inputs = batch(qwen)
    capsule = fitted(qwen, 1.0)
    model, ids = qwen.model, inputs["input_ids"]
    with torch.no_grad():
        features = model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"]).pooler_output
        embeds = model.get_input_embeddings()(ids)
        embeds[ids == qwen.config.image_token_id] = torch.cat(list(features))
        whole = model(**inputs, past_key_values=full_cache(qwen), use_cache=True).logits
        kinds = inputs["mm_token_type_ids"]
        positions, _ = model.model.get_rope_index(
            ids, kinds, inputs["image_grid_thw"], None, attention_mask=inputs["attention_mask"]
        )
        cache, parts = capsule.cache(inputs), []
        for start in range(0, ids.shape[1], 23):
            end = min(start + 23, ids.shape[1])
            parts.append(
                model.model.language_model(
                    inputs_embeds=embeds[:, start:end],
                    position_ids=positions[..., start:end],
                    attention_mask=inputs["attention_mask"][:, :end],
                    past_key_values=cache,
                    use_cache=True,
                ).last_hidden_state
            )
        chunked = model.lm_head(torch.cat(parts, 1))
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(chunked[real], whole[real], atol=1e-4, rtol=0)
    assert cache.nbytes > 0


@few
def test_text_only_prompts_cost_no_capsules(vlm):
    inputs = vlm.inputs([([], "just words"), ([], "and fewer")])
    cache = fitted(vlm, 0.4).cache(inputs)
    assert_same(run(vlm, inputs, full_cache(vlm)), run(vlm, inputs, cache))
    assert all(layer.payload is None for layer in cache.capsule_layers.values())


def test_bfloat16(qwen):
    import copy

    model = copy.deepcopy(qwen.model).to(torch.bfloat16)
    inputs = batch(qwen)
    capsule = KVCapsule.fit(
        model, None, [qwen.inputs([([qwen.picture(9)], "x")])], 1.0, block_size=BLOCK, progress=False
    )
    a, b = (
        model.generate(**inputs, past_key_values=cache, max_new_tokens=NEW, do_sample=False)
        for cache in (DynamicCache(config=model.config), capsule.cache(inputs))
    )
    assert torch.equal(a, b)
    capsule.check_model(model)
    assert capsule.info.itemsize == 2
