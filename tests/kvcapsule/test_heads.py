"""The heads codec: what every head of every block keeps, against plain loops over rows, heads and tokens."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from capsight.kvcapsule.codecs import HeadsCodec, LayerCodec, QuantisedCodec
from capsight.kvcapsule.codecs.learnt import KEY_WEIGHT
from kvcapsule.conftest import blocks, codec, entries, equal, moments, precision, runs

Place = tuple[int, int, int]  # block, head, token


def pair(count: int, heads: int = 2, size: int = 8, head_dim: int = 4, seed: int = 7) -> list[Tensor]:
    """Keys and values [M, H, N, D] of which some blocks and heads say much more than others."""
    g = torch.Generator().manual_seed(seed)
    scale = torch.rand(count, heads, 1, 1, generator=g) * 3 + 0.1
    return [scale * blocks(count, heads, size, head_dim, seed + kind) for kind in (0, 1)]


def plain_scores(fitted: HeadsCodec, keys: Tensor, values: Tensor) -> Tensor:
    """Geometric mean of four squared Mahalanobis distances: of key and value, from mean and prediction."""
    covariance, metric = fitted.covariance().double()[[0, -1]], precision(fitted)
    found = torch.empty(keys.shape[:3], dtype=torch.float64)
    for block, head, n in torch.cartesian_prod(*map(torch.arange, keys.shape[:3])).tolist():
        others = [i for i in range(keys.shape[2]) if i != n]
        product = 1.0
        for kind, x in enumerate((keys, values)):
            centred = x[block, head].double() - fitted.mean[kind, head].double()
            c = covariance[kind]
            predicted = c[n, others] @ torch.linalg.solve(c[others][:, others], centred[others])
            for wrong in (centred[n], centred[n] - predicted):
                product *= float(wrong @ metric[kind, head] @ wrong)
        found[block, head, n] = math.sqrt(math.sqrt(product))
    return found


def plain_best(scores: Tensor, kept: int) -> set[Place]:
    """What one row keeps: the best token of every head of every block, then one token at a time."""
    blocks, heads, size = scores.shape
    score = {
        (block, head, n): float(scores[block, head, n])
        for block in range(blocks)
        for head in range(heads)
        for n in range(size)
    }
    chosen: set[Place] = set()
    for block in range(blocks):
        for head in range(heads):
            chosen.add(max(((block, head, n) for n in range(size)), key=score.get))
    while len(chosen) < kept * blocks * heads:
        chosen.add(max(score.keys() - chosen, key=score.get))
    return chosen


def places(keep: Tensor) -> set[Place]:
    return {(block, head, n) for block, head, n in keep.nonzero().tolist()}


sizes = st.lists(st.integers(0, 4), min_size=1, max_size=3).filter(any)  # blocks of each row


@settings(max_examples=25)
@given(st.integers(1, 3), st.integers(2, 9), st.integers(1, 5), st.booleans(), st.integers(0, 99))
def test_scores_are_distances_from_the_mean_and_from_what_all_others_predict(
    heads, size, head_dim, joint, seed
):
    fitted = codec("heads", 1, heads, size, head_dim, joint=joint)
    keys, values = pair(2, heads, size, head_dim, seed)
    expected = plain_scores(fitted, keys, values)
    found = fitted.scores(keys, values)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, atol=1e-3 * float(expected.mean()), rtol=1e-3)


@pytest.mark.parametrize("joint", [True, False])
def test_keys_and_values_are_predicted_with_their_own_second_moments(joint):
    """Otherwise the test above could not tell which of the two moments was used."""
    fitted = codec("heads", 1, joint=joint)
    keys, values = pair(3)
    found = fitted.scores(keys, values)
    swapped = HeadsCodec(fitted.packed.flip(0), fitted.mean, fitted.whitening, 8, 1).scores(keys, values)
    assert torch.equal(found, swapped) == joint


@settings(max_examples=60)
@given(
    st.lists(st.integers(1, 4), min_size=1, max_size=3),
    st.integers(1, 3),
    st.integers(2, 7),
    st.sampled_from([2, 5, 10**6]),
    st.data(),
)
def test_best_gives_tokens_one_at_a_time(blocks_of_rows, heads, size, levels, data):
    kept, seed = data.draw(st.integers(1, size)), data.draw(st.integers(0, 999))
    g = torch.Generator().manual_seed(seed)
    shape = sum(blocks_of_rows), heads, size
    scores = torch.randint(levels, shape, generator=g).float()  # of few levels, many are equal
    if levels > 5:
        scores = torch.randperm(scores.numel(), generator=g).float().view(shape)
    keep = codec("heads", kept, heads, size).best(scores, blocks_of_rows)
    assert keep.any(2).all()
    for own, kept_of_row in zip(scores.split(blocks_of_rows), keep.split(blocks_of_rows), strict=True):
        expected = plain_best(own, kept)
        assert kept_of_row.sum() == len(expected) == len(own) * heads * kept
        assert sorted(own[kept_of_row].tolist()) == sorted(float(own[place]) for place in expected)
        if levels > 5:
            assert places(kept_of_row) == expected


@settings(max_examples=40)
@given(sizes, st.integers(1, 3), st.integers(2, 9), st.booleans(), st.integers(0, 99), st.data())
def test_capsules_hold_the_best_tokens_of_each_row_bit_for_bit(of_rows, heads, size, joint, seed, data):
    kept = data.draw(st.integers(1, size))
    fitted = codec("heads", kept, heads, size, 3, joint=joint)
    keys, values = pair(sum(of_rows), heads, size, 3, seed)
    payload = fitted.encode_runs(keys, values, runs(*of_rows))
    found, scores, first = entries(payload), fitted.scores(keys, values), 0
    decoded, bias = fitted.decode(payload), fitted.bias(payload)
    for count in of_rows:
        own = slice(first, first + count)
        expected = plain_best(scores[own], kept)
        for block in range(count):
            for head in range(heads):
                kept_here = sorted(n for b, h, n in expected if (b, h) == (block, head))
                at, *stored = found[first + block][head]
                assert at == kept_here != []
                gone = [n for n in range(size) if n not in kept_here]
                for x, full, y in zip(stored, decoded, (keys, values), strict=True):
                    whole = full[first + block, head]
                    assert torch.equal(x, y[first + block, head, kept_here])
                    assert torch.equal(whole[kept_here], x)
                    assert not whole[gone].any()
                if bias is not None:
                    assert not bias[first + block, head, kept_here].any()
                    assert (bias[first + block, head, gone] == -torch.inf).all()
        if count:  # rows do not matter to each other
            index = torch.arange(first, first + count)
            assert equal(payload.select(index), fitted.encode(keys[own], values[own]))
        first += count
    assert (bias is None) == (kept == size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keeping_everything_gives_the_blocks_back(dtype):
    keys, values = (x.to(dtype) for x in pair(3))
    keys[0, 0, 0, 0] = -0.0
    fitted = codec("heads", 8)
    payload = fitted.encode(keys, values)
    assert (payload.tensors["counts"] == 8).all()
    assert fitted.bias(payload) is None
    for found, x in zip(fitted.decode(payload), (keys, values), strict=True):
        assert torch.equal(found.contiguous().view(torch.uint8), x.contiguous().view(torch.uint8))


@pytest.mark.parametrize(("size", "position", "number"), [(8, 1, 1), (255, 1, 1), (256, 1, 4), (257, 4, 4)])
def test_bytes_of_positions_and_of_their_number(size, position, number):
    """A position goes up to N - 1, a number of tokens up to N."""
    fitted = codec("heads", 3, 2, size, 1)
    keys, values = pair(2, 2, size, 1)
    for kept in (3, size):
        own = fitted.resized(kept)
        payload = own.encode(keys, values)
        assert payload.nbytes == 2 * 2 * (kept * (2 * 4 + position) + number)
        assert payload.nbytes == 2 * own.payload_nbytes(2, 1, 4)
        assert payload.tensors["counts"].sum() == 2 * 2 * kept
        assert all(at == sorted(set(at)) for of_block in entries(payload) for at, *_ in of_block)
    assert payload.tensors["counts"].tolist() == [[size, size]] * 2


def plain_rounding(x: Tensor, bits: int) -> Tensor:
    """Numbers `[D]` in steps between the smallest and the largest."""
    low, step = float(x.min()), float(x.max() - x.min()) / (2**bits - 1)
    return torch.tensor([low + step * round((float(number) - low) / step) for number in x])


@pytest.mark.parametrize("bits", [8, 4])
def test_few_bits_token_by_token_keys_in_units_of_what_is_usual(bits):
    inner = codec("heads", 3)
    keys, values = pair(5)
    payload = QuantisedCodec(inner, bits).encode_runs(keys, values, runs(3, 2))
    exact = inner.encode_runs(keys, values, runs(3, 2))
    assert payload.tensors["keys.levels"].shape == (5 * 2 * 3, 4 if bits == 8 else 2)
    for name in ("keys.step", "keys.low", "values.step", "values.low"):
        assert payload.tensors[name].shape == (5 * 2 * 3, 1)
    variance = torch.linalg.inv(precision(inner)[0]).diagonal(dim1=1, dim2=2)  # [H, D]
    usual = (KEY_WEIGHT * variance.sqrt()).float()
    opened = QuantisedCodec(inner, bits).opened(payload)
    for of_block, of_block_exact in zip(entries(opened), entries(exact), strict=True):
        for head, (found, expected) in enumerate(zip(of_block, of_block_exact, strict=True)):
            assert found[0] == expected[0]
            mean = inner.mean[0, head]
            for key, value, key_before, value_before in zip(*found[1:], *expected[1:], strict=True):
                rounded = plain_rounding((key_before - mean) / usual[head], bits) * usual[head] + mean
                torch.testing.assert_close(key, rounded, atol=1e-4, rtol=1e-4)
                torch.testing.assert_close(value, plain_rounding(value_before, bits), atol=1e-5, rtol=1e-5)


def test_what_is_usual_of_keys_is_what_calibration_saw():
    fitted: LayerCodec = codec("heads", 3)
    seen = moments(2, 8, 4).keys
    payload = fitted.encode(*pair(4))
    mean, deviation = fitted.typical_keys(payload)
    counts = payload.tensors["counts"].sum(0).tolist()
    for head, (means, deviations) in enumerate(zip(mean.split(counts), deviation.split(counts), strict=True)):
        variance = seen.channel_covariance()[head].diagonal()
        torch.testing.assert_close(means.double(), seen.channel_mean()[head].expand_as(means))
        torch.testing.assert_close(
            deviations.double(), variance.sqrt().expand_as(deviations), atol=0, rtol=2e-2
        )


def test_several_layers_at_once_with_counts_of_their_own():
    keys, values = pair(5)
    codecs = [codec("heads", kept, joint=joint) for kept, joint in ((3, True), (5, False), (8, True))]
    together = HeadsCodec.encode_layers(codecs, [keys] * 3, [values] * 3, runs(2, 3))
    for one, payload in zip(codecs, together, strict=True):
        assert equal(payload, one.encode_runs(keys, values, runs(2, 3)))


@pytest.mark.parametrize("kept", [1, 7, 8])
@pytest.mark.parametrize("bits", [None, 8, 4])
def test_tokens_are_hidden_where_there_is_a_bias(kept, bits):
    fitted = codec("heads", kept, 2, 8, 4)
    made = fitted if bits is None else QuantisedCodec(fitted, bits)
    payload = made.encode_runs(*pair(3), runs(3))
    assert made.hides(payload) is (made.bias(payload) is not None) is (kept < 8)
