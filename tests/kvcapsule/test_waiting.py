"""The queue of layers that wait: what it encodes is what each codec makes alone, and it keeps nothing."""

from __future__ import annotations

import pytest
import torch

from capsight.kvcapsule.cache.waiting import EncodeQueue
from capsight.kvcapsule.codecs import QuantisedCodec
from kvcapsule.conftest import blocks, codec, equal, runs


@pytest.fixture
def inversions(monkeypatch):
    """How often a matrix, or a batch of them, is inverted: a list that grows."""
    invert, calls = torch.linalg.inv, []

    def counted(matrices):
        calls.append(matrices.shape)
        return invert(matrices)

    monkeypatch.setattr(torch.linalg, "inv", counted)
    return calls


def pairs(count):
    """Keys and values [M, H, N, D] of so many layers."""
    seeds = [(2 * layer, 2 * layer + 1) for layer in range(count)]
    return [tuple(blocks(3, 2, 8, 4, seed) for seed in pair) for pair in seeds]


@pytest.mark.parametrize("bits", [None, 8])
def test_heads_are_made_ready_once_for_all_layers_of_a_prefill(inversions, bits):
    alone = [codec("heads", kept) for kept in (3, 5, 3)]
    if bits is not None:
        alone = [QuantisedCodec(inner, bits) for inner in alone]
    queue, where = EncodeQueue(alone), runs(1, 2)
    for turn in (1, 2):
        found = [queue.add(own, *pair, where) for own, pair in zip(alone, pairs(3), strict=True)]
        payloads = [queue.payload(waiting) for waiting in found]
        assert len(inversions) == turn
    for own, pair, payload in zip(alone, pairs(3), payloads, strict=True):
        assert equal(payload, own.encode_runs(*pair, where))
    assert len(inversions) == 2 + 3  # codecs that were made ready learnt nothing that stays


def test_a_prefill_that_breaks_off_leaves_nothing(inversions):
    alone = [codec("heads", 3) for _ in range(2)]
    queue, (first, second) = EncodeQueue(alone), pairs(2)
    queue.add(alone[0], *first, runs(3))
    queue.clear()
    payload = queue.payload(queue.add(alone[1], *second, runs(1, 2)))
    assert equal(payload, alone[1].encode_runs(*second, runs(1, 2)))


def test_second_moments_of_different_numbers_are_inverted_one_by_one(inversions):
    alone = [codec("heads", 3, joint=joint) for joint in (True, False)]
    queue = EncodeQueue(alone)
    for own, pair in zip(alone, pairs(2), strict=True):
        payload = queue.payload(queue.add(own, *pair, runs(3)))
        assert equal(payload, own.encode_runs(*pair, runs(3)))
    assert [len(shape) for shape in inversions] == [3] * 4


def test_what_keeps_all_is_not_inverted(inversions):
    alone = [codec("heads", 8) for _ in range(2)]
    queue = EncodeQueue(alone)
    for own, pair in zip(alone, pairs(2), strict=True):
        queue.add(own, *pair, runs(3))
    assert not inversions


def test_layers_of_adaptive_are_encoded_together():
    alone = [codec("adaptive", kept) for kept in (3, 5)]
    queue, where = EncodeQueue(alone), runs(1, 2)
    found = [queue.add(own, *pair, where) for own, pair in zip(alone, pairs(2), strict=True)]
    assert [waiting.payload for waiting in found] == [None, None]
    for own, pair, waiting in zip(alone, pairs(2), found, strict=True):
        assert equal(queue.payload(waiting), own.encode_runs(*pair, where))
        assert queue._held is None
