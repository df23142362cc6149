"""Calls at once on one model, from threads, tasks and contexts that overlap: each as if it were alone."""

from __future__ import annotations

import asyncio
import copy
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest
import torch

import capsight
from capsight.cache_argument import CACHE
from capsight.errors import CapsightError
from tiny import CACHES, FAMILIES, in_turn

from .conftest import few, fitted
from .test_enable import assert_same, greedy


def prompt(vlm, seed):
    return vlm.inputs(
        [([vlm.picture(seed), vlm.picture(seed + 1)][: 1 + seed % 2], f"what is {seed}" * (1 + seed))]
    )


def implementation(model):
    return model.config.get_text_config()._attn_implementation


def conversation(vlm, capsule, seed, turns=3, barrier=None, fault=None):
    """Two questions about the images of `seed`, and a call of the model's own."""
    inputs, found = prompt(vlm, seed), []
    with capsight.enable(vlm.model, capsule=capsule) as fast:
        for turn in range(turns):
            if barrier is not None:
                barrier.wait(60)
            if fault is not None and turn == 1:
                raise fault
            cache = fast.encapsulate(**inputs)
            found.append(greedy(fast.generate, **{CACHE: cache}, **inputs))
            found.append(greedy(vlm.model.generate, **inputs))
    return found


@in_turn("codec", ["joint", "heads"], CACHES)
def test_threads_with_contexts_of_their_own(vlm, codec):
    capsules = [fitted(vlm.name, 0.4, codec), fitted(vlm.name, 1.0, codec)]
    before = implementation(vlm.model)
    alone = [conversation(vlm, capsules[seed % 2], seed, 1) for seed in range(2)]
    barrier = threading.Barrier(2)
    with ThreadPoolExecutor(2) as pool:
        at_once = list(pool.map(lambda s: conversation(vlm, capsules[s % 2], s, 2, barrier), range(2)))
    assert implementation(vlm.model) == before
    assert "generate" not in vars(vlm.model)
    for ours, theirs in zip(at_once, alone, strict=True):
        for index, answer in enumerate(ours):
            assert_same(answer, theirs[index % 2])


@in_turn("codec", ["heads", "joint"], CACHES)
def test_an_error_in_one_thread_leaves_the_others_alone(vlm, codec):
    capsule, barrier = fitted(vlm.name, 0.4, codec), threading.Barrier(2)
    before = implementation(vlm.model)
    alone = conversation(vlm, capsule, 0, 1)
    with ThreadPoolExecutor(2) as pool:
        broken = pool.submit(conversation, vlm, capsule, 1, 2, barrier, RuntimeError("broken"))
        whole = pool.submit(conversation, vlm, capsule, 0, 2, barrier)
        with pytest.raises(RuntimeError, match="broken"):
            broken.result()
        for index, answer in enumerate(whole.result()):
            assert_same(answer, alone[index % 2])
    assert implementation(vlm.model) == before


@few
def test_tasks(vlm):
    capsule = fitted(vlm.name, 0.4)
    alone = [conversation(vlm, capsule, seed, 1)[0] for seed in range(3)]

    async def ask(seed):
        inputs = prompt(vlm, seed)
        with capsight.enable(vlm.model, capsule=capsule) as fast:
            cache = await asyncio.to_thread(fast.encapsulate, **inputs)
            await asyncio.sleep(0.01 * seed)
            first = await asyncio.to_thread(greedy, fast.generate, **{CACHE: cache}, **inputs)
            assert_same(
                await asyncio.to_thread(greedy, vlm.model.generate, **inputs), greedy(fast.generate, **inputs)
            )
            return first

    async def everything():
        return await asyncio.gather(*map(ask, range(3)))

    before = implementation(vlm.model)
    for ours, theirs in zip(asyncio.run(everything()), alone, strict=True):
        assert_same(ours, theirs)
    assert implementation(vlm.model) == before


@pytest.mark.parametrize("stock", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["qwen2_5_vl", "gemma3"])
def test_contexts_that_end_in_any_order(name, stock):
    vlm = FAMILIES[name]()
    model, inputs = copy.deepcopy(vlm.model), prompt(vlm, 1)
    model.set_attn_implementation(stock)
    full = greedy(model.generate, **inputs)
    first, second = (capsight.enable(model, capsule=fitted(name, share)) for share in (0.4, 1.0))
    a = first.__enter__()
    lossy = greedy(a.generate, **inputs)
    b = second.__enter__()
    assert_same(greedy(model.generate, **inputs), full)
    first.__exit__(None, None, None)
    assert_same(greedy(model.generate, **inputs), full)
    assert_same(greedy(b.generate, **inputs), full)
    second.__exit__(None, None, None)
    assert implementation(model) == stock
    assert_same(greedy(model.generate, **inputs), full)
    assert not torch.equal(lossy.logits[1], full.logits[1])


def test_models_that_share_a_config(qwen):
    one, inputs = copy.deepcopy(qwen.model), prompt(qwen, 1)
    two = type(one)(one.config)
    two.load_state_dict(one.state_dict())
    two.eval()
    before = implementation(one)
    full = greedy(one.generate, **inputs)
    first, second = (capsight.enable(m, capsule=fitted("qwen2_5_vl", 1.0)) for m in (one, two))
    first.__enter__()
    with second as b:
        first.__exit__(None, None, None)
        assert_same(greedy(b.generate, **inputs), full)
    assert implementation(one) == implementation(two) == before


@pytest.mark.parametrize("stock", ["sdpa", "eager"])
def test_a_thread_outside_runs_what_it_always_did_and_is_told(qwen, stock):
    model, inputs = copy.deepcopy(qwen.model), prompt(qwen, 1)
    model.set_attn_implementation(stock)
    full = greedy(model.generate, **inputs)
    with ThreadPoolExecutor(1) as pool, capsight.enable(model, capsule=fitted("qwen2_5_vl", 0.4)) as fast:
        with pytest.warns(UserWarning, match="not inside the enable"):
            outside = pool.submit(greedy, model.generate, **inputs).result()
        assert_same(outside, full)
        inside = pool.submit(greedy, fast.generate, **inputs).result()
        assert_same(inside, greedy(fast.generate, **inputs))
        assert not torch.equal(inside.logits[1], full.logits[1])


@pytest.mark.parametrize("stock", ["sdpa", "eager"])
def test_a_pass_that_began_inside_ends_right_outside(qwen, stock):
    model, inputs = copy.deepcopy(qwen.model), prompt(qwen, 1)
    model.set_attn_implementation(stock)
    with torch.no_grad():
        full = model(**inputs).logits
    inside, gone = threading.Event(), threading.Event()

    def wait(*_):
        inside.set()
        gone.wait(30)

    hook = model.get_decoder().layers[0].register_forward_pre_hook(wait)
    with ThreadPoolExecutor(1) as pool:
        with capsight.enable(model, capsule=fitted("qwen2_5_vl", 0.4)), torch.no_grad():
            call = pool.submit(torch.no_grad()(model), **inputs)
            inside.wait(30)
        gone.set()
        torch.testing.assert_close(call.result().logits, full, atol=1e-4, rtol=0)
    hook.remove()


def test_two_calls_over_one_cache_are_refused(qwen):
    inputs, started, done = prompt(qwen, 1), threading.Event(), threading.Event()

    def wait(ids, scores):
        started.set()
        done.wait(30)
        return scores

    with (
        ThreadPoolExecutor(1) as pool,
        capsight.enable(qwen.model, capsule=fitted("qwen2_5_vl", 1.0)) as fast,
    ):
        cache = fast.encapsulate(**inputs)
        other = copy.deepcopy(cache)
        call = pool.submit(
            fast.generate, **{CACHE: cache}, **inputs, max_new_tokens=2, logits_processor=[wait]
        )
        started.wait(30)
        with pytest.raises(CapsightError, match="another call"):
            fast.generate(**{CACHE: cache}, **inputs, max_new_tokens=2)
        greedy(fast.generate, **{CACHE: other}, **inputs)
        done.set()
        call.result()


def test_ctrl_c_in_a_pass_leaves_nothing_behind(qwen):
    inputs, head_map = prompt(qwen, 1), None
    text = qwen.config.get_text_config()
    head_map = capsight.HeadMap.all_dense(text.num_hidden_layers, text.num_attention_heads)
    full = greedy(qwen.model.generate, **inputs)

    def stop(*_):
        raise KeyboardInterrupt

    with capsight.enable(
        qwen.model, capsule=fitted("qwen2_5_vl", 1.0), head_map=head_map, prefill="sparse"
    ) as fast:
        hook = qwen.model.get_decoder().layers[1].register_forward_pre_hook(stop)
        with pytest.raises(KeyboardInterrupt):
            qwen.model(**inputs)
        hook.remove()
        assert_same(greedy(fast.generate, **inputs), full)
    assert_same(greedy(qwen.model.generate, **inputs), full)
    with ExitStack() as stack:
        stack.enter_context(capsight.enable(qwen.model, head_map=head_map, prefill="sparse"))
        with torch.no_grad():
            torch.testing.assert_close(qwen.model(**inputs).logits[:, -1], full.logits[0], atol=1e-4, rtol=0)
