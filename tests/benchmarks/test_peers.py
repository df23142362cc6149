"""Peers of the judges' page: what they store and count; where they drop nothing, they change nothing."""

from __future__ import annotations

import pytest
import torch
from judges_known import load_source
from peers import PEERS, make_peers
from peers.paged import PooledCodec
from peers.pruning import distinct, diverse
from peers.scores import leverage
from peers.tokens import Tokens
from peers.whole import rotated, uniform

from capsight.evaluation import evaluate, summary
from capsight.kvcapsule.codecs.rotary import Rotary
from capsight.serving.plan import plan_request


@pytest.fixture(scope="module")
def mosaic():
    return load_source("mosaic", torch.float32)


def test_nothing_dropped_is_the_full_cache_and_less_is_fewer_bytes(mosaic) -> None:
    items = mosaic.items("dev", 4, 1)
    names = [name for name in PEERS if "-4" not in name]
    methods = make_peers(names, [1.0, 0.1], mosaic.model, mosaic.block)
    rows = summary(evaluate(mosaic.model, mosaic.processor, items, methods, max_new_tokens=4))
    for label, row in rows.items():
        if label.endswith(" 1"):
            assert row["kl"] < 1e-4, label
            assert row["agreement"] == 100
        elif label.endswith(" 0.1"):
            assert row["kl"] > 1e-4, label
            assert 0.08 < row["kv_bytes"] / row["kv_bytes_full"] < 0.2, label


def test_pictures_of_any_size_are_one_run(mosaic) -> None:
    assert mosaic.block == 49


def test_leverage_adds_up_to_the_rank() -> None:
    keys = torch.randn(2, 90, 8, generator=torch.Generator().manual_seed(1))
    still = Rotary(torch.zeros(4, dtype=torch.float64), torch.zeros(4, dtype=torch.int64), False, 1.0)
    keys[0, 7] = 40  # alone in its direction
    tokens = Tokens(keys, keys, keys, torch.zeros(3, 90, dtype=torch.int64), still)
    assert leverage(tokens, 0.5)[0].argmax() == 7


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_few_bits_and_their_bytes(bits: int) -> None:
    x = torch.randn(3, 70, 32, generator=torch.Generator().manual_seed(0))
    x[..., 5] += 30
    held, nbytes = uniform(x.mT, bits)  # 70 tokens of a channel are two groups
    assert nbytes == 3 * 70 * 32 * bits / 8 + 3 * 32 * 2 * 4
    assert (held.mT - x).abs().max() < 7.5 / (2**bits - 1) / 2
    held, nbytes = rotated(x, bits)
    assert nbytes == 3 * 70 * 32 * bits / 8 + 3 * 70 * 2
    assert (held - x).norm() / x.norm() < {2: 0.4, 3: 0.25, 4: 0.15}[bits]


def test_what_is_pruned() -> None:
    embeds = torch.tensor([[1.0, 0.0], [1.0, 0.01], [0.0, 1.0], [-1.0, 0.0], [1.0, 0.02]])
    assert diverse(embeds, 3)[[2, 3]].all()
    assert diverse(embeds, 5).all()
    pixels = torch.tensor([[1, 1], [1, 1], [2, 2], [1, 1], [3, 3], [1, 1]])
    assert distinct(pixels, [3, 3]).tolist() == [True, False, True, True, True, False]


def test_pooled_heads_share_what_paged_ones_have_alike() -> None:
    plan = plan_request([(0, 39), (42, 95)], 96, 8, 0.25)
    keys = torch.randn(3, plan.image_tokens, 4, generator=torch.Generator().manual_seed(2))
    keys[1, ::2] *= 30  # half the tokens of one head stand out
    keep = PooledCodec([plan]).chosen(keys, keys, plan)
    assert keep.shape == (3, plan.image_tokens)
    assert keep.sum() == 3 * plan.kept_image_tokens
    counts = keep.sum(1)
    assert counts.min() < plan.kept_image_tokens < counts.max()
    least = 3 * plan.kept_image_tokens // 2 // 2  # half of all, by two images
    assert all(part.sum() >= least for part in keep.split(list(plan.sizes), 1))
