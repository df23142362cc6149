"""Steps in a graph of `torch.compile`: what they write, how many graphs are made, and where none can be."""

from __future__ import annotations

import copy
import logging
import random
from unittest import mock

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import CompileConfig

import capsight
from capsight.kvcapsule.cache.layer_tokens import LayerTokens
from capsight.kvcapsule.cache.steps import Steps
from capsight.runtime import compiled
from kvcapsule.test_generate import asked, assert_same, batch, later_turn
from tiny import FAMILIES

from .conftest import fitted

PLAIN = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True}
COMPILED = ["qwen2_5_vl", "llava_onevision", "glm4v"]


@pytest.fixture(autouse=True)
def _no_graphs():
    torch._dynamo.reset()
    counters.clear()
    compiled._say.cache_clear()
    yield
    torch._dynamo.reset()


def graphs(backend: str = "aot_eager") -> dict[str, CompileConfig]:
    """What steps over a `StaticCache` are compiled on CPUs with."""
    config = capsight.compiled_steps()
    config.backend = backend
    return {"compile_config": config}


def made() -> int:
    assert not counters["graph_break"]
    return counters["stats"]["unique_graphs"]


def conversation(fast, inputs, turns: int = 2, new: int = 8, **options) -> list:
    """What is written in some turns, the first one on a cache that has read the images."""
    options = PLAIN | {"max_new_tokens": new, "min_new_tokens": new} | options
    found, cache = [], fast.encapsulate(**inputs)
    for turn in range(turns):
        found.append(fast.generate(past_key_values=cache, **inputs, **options))
        inputs = later_turn(asked(fast.vlm, found[-1].sequences, "and now?" * (turn + 1)), inputs)
    return found


def both(vlm, capsule, inputs, **options) -> list:
    """Assert that graphs change nothing; what was written."""
    with capsight.enable(vlm.model, capsule=capsule, decode="latent") as fast:
        fast.vlm = vlm
        plain = conversation(fast, inputs, **options)
        assert not counters["stats"]
        for a, b in zip(plain, conversation(fast, inputs, **options, **graphs()), strict=True):
            assert_same(a, b)
        assert fast.cache.steps is None
        assert not fast.cache.is_compileable
    return plain


@pytest.mark.parametrize("name", COMPILED)
def test_turns_of_rows_that_differ_are_written_in_two_graphs(name):
    """Left-padded rows of two images, of one and of none, past the room that the tail has at first."""
    vlm = FAMILIES[name]()
    both(vlm, fitted(name, 0.4), batch(vlm), turns=3, new=20)
    assert 1 <= made() <= 2


@pytest.mark.parametrize("codec", ["joint", "adaptive", "int8"])
def test_codecs(qwen, codec):
    capsule = fitted(qwen.name, 0.4).with_bits(8) if codec == "int8" else fitted(qwen.name, 0.4, codec)
    both(qwen, capsule, batch(qwen))
    assert 1 <= made() <= 2


def test_prompts_of_all_kinds_share_the_graphs_of_their_batch_size(qwen):
    rng, capsule = random.Random(0), fitted(qwen.name, 0.4)
    for rows in (2, 2, 2, 1, 1):
        samples = []
        for _ in range(rows):
            sizes = rng.choices([qwen.size, qwen.other_size], k=rng.randrange(3))
            pictures = [qwen.picture(rng.randrange(99), size) for size in sizes]
            samples.append((pictures, "what do you see " * rng.randrange(1, 9)))
        both_ways = made()
        with capsight.enable(qwen.model, capsule=capsule) as fast:
            inputs, more = qwen.inputs(samples), {"max_new_tokens": rng.randrange(4, 20), **PLAIN}
            assert_same(fast.generate(**inputs, **more), fast.generate(**inputs, **more, **graphs()))
        assert made() <= both_ways + 2
    assert made() <= 4


def test_padding_between_turns_is_hidden(qwen):
    """Tokens that a row's mask hides in the middle of the conversation."""
    inputs = batch(qwen)
    with capsight.enable(qwen.model, capsule=fitted(qwen.name, 0.4)) as fast:
        first = fast.generate(**inputs, max_new_tokens=4, min_new_tokens=4, **PLAIN)
        again = later_turn(asked(qwen, first.sequences, "and now what?"), inputs)
        again["attention_mask"][1, inputs["input_ids"].shape[1] + 1 :][:3] = 0
        caches = fast.cache, copy.deepcopy(fast.cache)
        found = [
            fast.generate(past_key_values=cache, **again, max_new_tokens=8, **PLAIN, **options)
            for cache, options in zip(caches, ({}, graphs()), strict=True)
        ]
        assert_same(*found)
    assert made() >= 1


def test_another_thread_that_compiles_changes_nothing(qwen):
    """While one does, torch says that all do."""
    inputs = batch(qwen)
    with capsight.enable(qwen.model, capsule=fitted(qwen.name, 0.4)) as fast:
        cache = fast.encapsulate(**inputs)
        length, cache.steps = cache.get_seq_length(), Steps.of(cache, compiled._attention)
        with mock.patch.object(torch.compiler, "is_compiling", return_value=True):
            assert cache.get_seq_length() == length
            assert torch.ops.capsight.seen(cache.steps.number) == length
            assert not compiled.is_step({"past_key_values": cache})


def test_beams_and_several_sequences(qwen):
    inputs = batch(qwen)
    with capsight.enable(qwen.model, capsule=fitted(qwen.name, 0.4)) as fast:
        for options in ({"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}):
            asked_for = {"max_new_tokens": 6, "do_sample": False, **options}
            plain = fast.generate(**inputs, **asked_for)
            assert torch.equal(plain, fast.generate(**inputs, **asked_for, **graphs()))


@pytest.mark.slow
def test_code_of_inductor_in_autocast_and_inference_mode(qwen):
    inputs = batch(qwen)
    asked_for = PLAIN | {"max_new_tokens": 6, "min_new_tokens": 6}
    with capsight.enable(qwen.model, capsule=fitted(qwen.name, 0.4)) as fast:
        assert_same(
            fast.generate(**inputs, **asked_for), fast.generate(**inputs, **asked_for, **graphs("inductor"))
        )
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            a, b = (fast.generate(**inputs, **asked_for, **o) for o in ({}, graphs("inductor")))
    for x, y in zip(a.logits, b.logits, strict=True):
        torch.testing.assert_close(x, y, atol=0.1, rtol=0)
    assert made() >= 2


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("gemma3", {}, "states or sliding windows"),
        ("qwen3_5", {}, "states or sliding windows"),
        ("llava_onevision", {"decode": "materialise"}, "rebuilds"),
    ],
)
def test_a_log_line_says_why_there_is_no_graph(caplog, name, options, reason):
    vlm, capsule = FAMILIES[name](), fitted(name, 0.4, "adaptive" if options else "heads")
    inputs, found = batch(vlm), []
    with caplog.at_level(logging.WARNING, "capsight"):
        for more in ({}, graphs(), graphs()):
            with capsight.enable(vlm.model, capsule=capsule, **options) as fast:
                found.append(fast.generate(**inputs, max_new_tokens=6, **PLAIN, **more))
    assert_same(found[0], found[1])
    assert_same(found[0], found[2])
    lines = [r.message for r in caplog.records if r.name == "capsight" and "not compiled" in r.message]
    assert len(lines) == 1
    assert reason in lines[0]
    assert not made()


def test_nothing_is_compiled_unless_it_is_asked(qwen):
    inputs, config = batch(qwen), CompileConfig(mode="default", backend="aot_eager")
    with capsight.enable(qwen.model, capsule=fitted(qwen.name, 0.4)) as fast:
        fast.generate(**inputs, max_new_tokens=3)
        fast.generate(**inputs, max_new_tokens=3, compile_config=config)  # for GPUs, as over a StaticCache
        fast.generate(**inputs, max_new_tokens=3, disable_compile=True, **graphs())
    assert not made()


def test_a_step_that_breaks_off_leaves_the_cache_as_it_was(qwen):
    inputs = batch(qwen)
    options = PLAIN | {"max_new_tokens": 6, "min_new_tokens": 6}
    with capsight.enable(qwen.model, capsule=fitted(qwen.name, 0.4)) as fast:
        cache = fast.encapsulate(**inputs)
        expected = fast.generate(past_key_values=copy.deepcopy(cache), **inputs, **options)
        seen, calls, step = cache.get_seq_length(), [], LayerTokens.step

        def breaking(self, *given):
            calls.append(copy.deepcopy(cache))
            if len(calls) == 6:
                raise KeyboardInterrupt
            return step(self, *given)

        with mock.patch.object(LayerTokens, "step", breaking), pytest.raises(KeyboardInterrupt):
            fast.generate(past_key_values=cache, **inputs, **options, **graphs())
        assert (cache.get_seq_length(), cache.steps) == (seen, None)
        assert all(twin.steps is None for twin in calls)
        assert_same(fast.generate(past_key_values=cache, **inputs, **options, **graphs()), expected)
