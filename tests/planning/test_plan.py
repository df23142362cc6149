"""The whole plan: budgets, head maps, and what has to hold between the columns."""

from __future__ import annotations

import json

import pytest

from capsight.blindsight import Category, HeadMap
from capsight.errors import ModelMismatchError, OptionError
from capsight.planning import Budget, grids_of_tokens, plan
from tiny import FAMILIES

GB = 10**9


@pytest.fixture
def config():
    return FAMILIES["qwen2_5_vl"]().config


def images(config, count=4, tokens=256):
    return [grids_of_tokens(config, tokens)] * count


def test_requests_fill_the_budget(config):
    found = plan(config, images(config), 100, Budget(GB, retained=0.4), new_tokens=20)
    room = 0.9 * GB - found.weights_bytes
    for cache in (found.full, found.capsules):
        each = cache.kv_bytes + cache.scratch_bytes
        assert cache.requests * each + cache.module_bytes <= room
        assert (cache.requests + 1) * each + cache.module_bytes > room
    assert found.weights_bytes == 2 * found.parameters
    assert found.prompt_tokens == 4 * (256 + 2) + 100
    assert found.vision_tokens == found.capsule_tokens == 1024
    assert found.capsules.kv_bytes < found.full.kv_bytes


def test_weights_that_do_not_fit_leave_no_requests(config):
    found = plan(config, images(config), 100, Budget(GB, weights_bytes=2 * GB))
    assert found.full.requests == found.capsules.requests == 0


def test_batch_multiplies_flops_and_brings_break_even_nearer(config):
    one, four = (plan(config, images(config), 100, Budget(GB, batch=b)) for b in (1, 4))
    assert four.dense.total == 4 * one.dense.total
    assert four.full == one.full
    assert four.break_even_tokens < one.break_even_tokens


def test_break_even_is_where_both_are_equal(config):
    found = plan(config, images(config, 1), 0, Budget(GB))
    n = found.break_even_tokens
    for tokens, smaller in ((n, True), (max(n - 64, n // 2), False)):
        at = plan(config, [grids_of_tokens(config, tokens)], 0, Budget(GB))
        # Exact tokens (two delimiters here) keep 16 bytes of positions that break-even leaves out.
        ours = at.capsules.kv_bytes + at.capsules.module_bytes - 2 * 16
        assert (ours < at.full.kv_bytes) is smaller


@pytest.mark.parametrize("name", ["qwen2_5_vl", "gemma3"])
def test_head_maps(name):
    config = FAMILIES[name]().config
    text = config.get_text_config()
    shape = text.num_hidden_layers, text.num_attention_heads
    mix, budget = images(config, 4, 64), Budget(GB)
    none = plan(config, mix, 50, budget)
    assert none.sparse is None
    assert plan(config, mix, 50, budget, head_map=1.0).sparse == none.dense
    assert plan(config, mix, 50, budget, head_map=HeadMap.all_dense(*shape)).sparse == none.dense
    uniform = HeadMap.uniform(Category.INTRA_IMAGE_SINK, *shape)
    mapped = plan(config, mix, 50, budget, head_map=uniform)
    assert mapped.sparse == plan(config, mix, 50, budget, head_map=0.0).sparse
    assert mapped.sparse.attention < none.dense.attention
    assert mapped.sparse.linear == none.dense.linear
    half = plan(config, mix, 50, budget, head_map=0.5).sparse.attention
    assert half == (mapped.sparse.attention + none.dense.attention) // 2


def test_json_ready(config):
    values = plan(config, images(config), 100, Budget(GB), head_map=0.5).to_dict()
    assert json.loads(json.dumps(values)) == values
    assert values["dense"]["total"] == sum(values["dense"][k] for k in ("attention", "linear", "vision"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"gpu_bytes": 0}, "positive"),
        ({"gpu_bytes": GB, "batch": 0}, "positive"),
        ({"gpu_bytes": GB, "reserve": 1.0}, "reserve"),
        ({"gpu_bytes": GB, "retained": 0.0}, "retained"),
    ],
)
def test_bad_budgets(config, options, words):
    with pytest.raises(OptionError, match=words):
        plan(config, images(config), 10, Budget(**options))


def test_other_errors(config):
    with pytest.raises(OptionError, match="dense share"):
        plan(config, images(config), 10, Budget(GB), head_map=1.5)
    with pytest.raises(OptionError, match="new tokens"):
        plan(config, images(config), 10, Budget(GB), new_tokens=-1)
    with pytest.raises(ModelMismatchError, match="head map"):
        plan(config, images(config), 10, Budget(GB), head_map=HeadMap.all_dense(7, 3))
