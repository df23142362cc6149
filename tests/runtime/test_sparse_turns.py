"""Sparse prefill that comes in pieces: chunks of one prompt, and several turns on one cache."""

from __future__ import annotations

import pytest
import torch
import transformers
from packaging.version import Version

import capsight
from capsight.blindsight import Category, HeadMap, MaskOptions
from capsight.layout import build_layout
from capsight.runtime.prefill import SparsePrefill
from capsight.runtime.repeat import ContextRepeat
from capsight.runtime.split import sequence_length

from .conftest import fitted
from .test_enable import assert_same, greedy, mixed_batch
from .test_sparse_prefill import size_of

OPTIONS = MaskOptions(own_window=3)


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.23"),
    reason="these versions do not take prompts with images in chunks, with or without capsight",
)
@pytest.mark.parametrize("category", [Category.SINK, Category.INTRA_IMAGE])
def test_chunks_of_a_prefill(qwen, category):
    """`generate(prefill_chunk_size=...)`: every chunk follows the head map, so chunking changes nothing."""
    inputs = mixed_batch(qwen)
    head_map = HeadMap.uniform(category, *size_of(qwen), OPTIONS)
    dense = greedy(qwen.model.generate, **inputs)
    with capsight.enable(qwen.model, head_map=head_map, prefill="sparse") as fast:
        whole = greedy(fast.generate, **inputs)
        chunked = greedy(fast.generate, **inputs, prefill_chunk_size=37)
    assert_same(chunked, whole)
    assert not torch.allclose(whole.logits[0][0], dense.logits[0][0], atol=1e-4)


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("chunk", [1, 7, 50])
def test_a_sliding_cache_does_not_confuse_the_chunks(qwen, window, chunk):
    """A layer with a window is handed only the keys that its cache still has."""
    inputs = mixed_batch(qwen)
    layout = build_layout(inputs, qwen.config)
    length, heads = layout.length, size_of(qwen)[1]
    head_map = HeadMap.uniform(Category.SINK, *size_of(qwen), OPTIONS)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(3, heads, length, 8, generator=generator) for _ in range(3))

    def prefill():
        return SparsePrefill(head_map, layout, qwen.config, seen=0, new=length)

    whole = prefill().attend(1, q, k, v, 0.3, window)
    pieces, running = [], prefill()
    for start in range(0, length, chunk):
        end = min(start + chunk, length)
        first = 0 if window is None else max(start - window + 1, 0)
        part = (q[:, :, start:end], k[:, :, first:end], v[:, :, first:end])
        pieces.append(running.attend(1, *part, 0.3, window))
    assert torch.allclose(torch.cat(pieces, 1), whole, atol=1e-5)
    assert running.attend(1, q[:, :, :1], k, v, 0.3, window) is None  # decoding is dense
    assert running.attend(2, q, k, v, 0.3, window) is not None  # layers count apart


def test_a_second_turn_on_the_cache_of_a_sparse_prefill(qwen):
    """Later turns are text, which sees everything: they equal one prefill of the whole conversation."""
    pictures = [[qwen.picture(1), qwen.picture(2)], [qwen.picture(3), qwen.picture(4)]]
    first = qwen.inputs([(p, "what is it") for p in pictures])
    texts = [qwen.prompt(p, "what is it") + "yes<|im_end|>\n<|im_start|>user\nand now?" for p in pictures]
    third = [text + "no<|im_end|>\n<|im_start|>user\nsure?" for text in texts]
    turns = [qwen.process(texts, pictures), qwen.process(third, pictures)]
    head_map = HeadMap.uniform(Category.INTRA_IMAGE, *size_of(qwen), OPTIONS)
    with capsight.enable(qwen.model, head_map=head_map, prefill="sparse") as fast:
        expected = [greedy(fast.generate, **turn) for turn in turns]
    with capsight.enable(
        qwen.model, head_map=head_map, prefill="sparse", capsule=fitted("qwen2_5_vl", 1.0)
    ) as fast:
        cache = fast.encapsulate(**first)
        ours = greedy(fast.generate, past_key_values=cache, **turns[0])
    assert_same(ours, expected[0])
    with capsight.enable(
        qwen.model, head_map=head_map, prefill="sparse", capsule=fitted("qwen2_5_vl", 1.0)
    ) as fast:
        fast.generate(**first, max_new_tokens=1)
        fast.generate(past_key_values=fast.cache, **turns[0], max_new_tokens=1)
        ours = greedy(fast.generate, past_key_values=fast.cache, **turns[1])
    assert_same(ours, expected[1])


def in_chunks(fast, inputs, chunk):
    """The last hidden states `[B, S, E]` of a prefill that comes in chunks, and the cache that it leaves."""
    given = ContextRepeat(fast.model)
    with given.recording(), torch.no_grad():
        fast.model(**inputs, use_cache=False)
    embeds, positions = given._given["inputs_embeds"], given._given["position_ids"]
    cache, length, pieces = fast.new_cache(inputs), sequence_length(inputs), []
    with fast._running(cache, fast._sparse(build_layout(inputs, fast.model.config), length)), torch.no_grad():
        for start in range(0, length, chunk):
            part = slice(start, start + chunk)
            output = fast.model.get_decoder()(
                inputs_embeds=embeds[:, part],
                position_ids=positions[..., part],
                attention_mask=inputs["attention_mask"][:, : start + chunk],
                past_key_values=cache,
            )
            pieces.append(output.last_hidden_state)
    return torch.cat(pieces, 1), cache


@pytest.mark.parametrize("codec", ["heads", "adaptive"])
@pytest.mark.parametrize("chunk", [20, 37])
def test_chunks_that_latent_decoding_could_answer_follow_the_head_map(qwen, chunk, codec):
    """A chunk without a whole run (text, part of an image) is no step of decoding."""
    inputs = qwen.inputs([([qwen.picture(1), qwen.picture(2)], "which one is it")])
    capsule = fitted("qwen2_5_vl", 0.4, codec).for_latent()
    head_map = HeadMap.uniform(Category.SINK, *size_of(qwen), OPTIONS)
    found = {}
    for decode in ("materialise", "latent"):
        with capsight.enable(
            qwen.model, capsule=capsule, head_map=head_map, prefill="sparse", decode=decode
        ) as fast:
            found[decode], cache = in_chunks(fast, inputs, chunk)
    assert (found["latent"] - found["materialise"]).abs().max() <= 1e-4
    assert cache.get_seq_length() == sequence_length(inputs)
