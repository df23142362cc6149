from __future__ import annotations

from inspect import signature

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from capsight.errors import OptionError
from capsight.kvcapsule.codecs import CODECS, StaticCodec
from capsight.kvcapsule.codecs.kriging import pivoted_cholesky, with_nugget
from kvcapsule.conftest import blocks, codec, moments, precision

NAMES = sorted(CODECS)
ADAPTIVE_PAIR = ["adaptive", "evict"]


def pair(count: int = 5, heads: int = 2, size: int = 8, head_dim: int = 4, seed: int = 7):
    return blocks(count, heads, size, head_dim, seed), blocks(count, heads, size, head_dim, seed + 1)


@settings(max_examples=40)
@given(st.integers(1, 3), st.integers(2, 12), st.integers(1, 5), st.booleans(), st.data())
def test_adaptive_against_plain_kriging(heads, size, head_dim, joint, data):
    kept = data.draw(st.integers(1, size))
    fitted = codec("adaptive", kept, heads, size, head_dim, joint=joint)
    keys, values = pair(3, heads, size, head_dim)
    payload = fitted.encode(keys, values)
    sums = moments(heads, size, head_dim)
    second = []
    for kind in (sums.keys, sums.values):
        c = torch.zeros(size, size, dtype=torch.float64)
        own = kind.about(kind.channel_mean()[:, None])
        for head in range(heads):
            c += own[head] / own[head].diagonal().mean() / heads
        second.append(c)
    if joint:
        second = [(second[0] + second[1]) / 2] * 2
    for kind, found, x in zip((sums.keys, sums.values), fitted.decode(payload), (keys, values), strict=True):
        c = with_nugget(second.pop(0), 1e-2)
        for block in range(3):
            s = payload.tensors["kept"][block].tolist()
            assert s == sorted(set(s))
            for head in range(heads):
                mean = kind.channel_mean()[head]
                centred = x[block, head].double() - mean
                expected = mean + c[:, s] @ torch.linalg.solve(c[s][:, s], centred[s])
                torch.testing.assert_close(found[block, head].double(), expected, atol=1e-3, rtol=1e-3)
                assert torch.equal(found[block, head, s], x[block, head, s])


@settings(max_examples=40)
@given(st.integers(1, 3), st.integers(2, 12), st.integers(1, 5), st.booleans(), st.integers(0, 99))
def test_kept_tokens_are_worst_predicted_by_mahalanobis_distance(heads, size, head_dim, joint, seed):
    kept = size // 2 + 1
    fitted = codec("adaptive", kept, heads, size, head_dim, joint=joint)
    keys, values = (x.double() for x in pair(2, heads, size, head_dim, seed))
    found = fitted.encode(keys.float(), values.float()).tensors["kept"]
    metric = precision(fitted)
    c = fitted.covariance().double()[[0, -1]]
    for block in range(2):
        chosen: list[int] = []
        for _ in range(kept):
            energy = torch.zeros(size, dtype=torch.float64)
            for kind, x in enumerate((keys, values)):
                for head in range(heads):
                    centred = x[block, head] - fitted.mean[kind, head]
                    maps = c[kind][:, chosen] @ torch.linalg.inv(c[kind][chosen][:, chosen])
                    wrong = centred - maps @ centred[chosen]
                    energy += ((wrong @ metric[kind, head]) * wrong).sum(1)
            energy[chosen] = -1
            chosen.append(int(energy.argmax()))
        assert found[block].tolist() == sorted(chosen)


@settings(max_examples=30)
@given(st.integers(1, 3), st.integers(2, 12), st.integers(1, 5), st.data())
def test_static_against_plain_ridge_and_pca(heads, size, head_dim, data):
    kept = data.draw(st.integers(1, size - 1))
    fitted = codec("static", kept, heads, size, head_dim)
    keys, values = pair(3, heads, size, head_dim)
    found_keys, found_values = fitted.decode(fitted.encode(keys, values))
    train_keys, train_values = blocks(24, heads, size, head_dim, 0), blocks(24, heads, size, head_dim, 1)
    c = torch.zeros(size, size, dtype=torch.float64)
    for head in range(heads):
        x = train_keys[:, head].double().transpose(1, 2).reshape(-1, size)
        c += x.T @ x / x.pow(2).mean() / len(x) / heads
    c = with_nugget(c, 1e-2)
    s = pivoted_cholesky(c, kept).tolist()
    samples = train_values.double().transpose(2, 3).reshape(-1, size)  # [samples, N]
    mean = samples.mean(0)
    basis = torch.linalg.svd(samples - mean, full_matrices=True).Vh[:kept].T
    for block in range(3):
        for head in range(heads):
            expected = c[:, s] @ torch.linalg.solve(c[s][:, s], keys[block, head].double()[s])
            torch.testing.assert_close(found_keys[block, head].double(), expected, atol=1e-3, rtol=1e-3)
            assert torch.equal(found_keys[block, head, s], keys[block, head, s])
            centred = values[block, head].double() - mean[:, None]
            expected = basis @ basis.T @ centred + mean[:, None]
            torch.testing.assert_close(found_values[block, head].double(), expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("joint", [True, False])
def test_evict_keeps_what_adaptive_keeps_and_zeros_the_rest(joint):
    keys, values = pair()
    adaptive, evict = (codec(name, 3, joint=joint) for name in ADAPTIVE_PAIR)
    payload = evict.encode(keys, values)
    assert torch.equal(payload.tensors["kept"], adaptive.encode(keys, values).tensors["kept"])
    missing = evict.missing(payload)
    assert missing.sum(1).tolist() == [5] * 5
    for found, x in zip(evict.decode(payload), (keys, values), strict=True):
        assert torch.equal(found, x.masked_fill(missing[:, None, :, None], 0))
    assert adaptive.missing(payload) is None


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_keeping_everything_is_bitwise_exact(name, dtype):
    keys, values = (x.to(dtype) for x in pair())
    keys[0, 0, 0, 0] = -0.0
    fitted = codec(name, 8)
    for found, x in zip(fitted.decode(fitted.encode(keys, values)), (keys, values), strict=True):
        assert torch.equal(found.contiguous().view(torch.uint8), x.contiguous().view(torch.uint8))
    assert fitted.bias(fitted.encode(keys, values)) is None


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_payload_bytes_dtype_select_and_join(name, dtype):
    keys, values = (x.to(dtype) for x in pair())
    fitted = codec(name, 3)
    payload = fitted.encode(keys, values)
    positions = {"adaptive": 3, "evict": 3, "heads": 2 * (3 + 1)}.get(name, 0)  # of heads with their number
    assert payload.nbytes == 5 * (2 * 3 * 2 * 4 * dtype.itemsize + positions)
    assert payload.nbytes == 5 * fitted.payload_nbytes(2, 4, dtype.itemsize)
    index = torch.tensor([3, 0])
    for found, whole in zip(fitted.decode(payload.select(index)), fitted.decode(payload), strict=True):
        assert found.dtype == dtype
        torch.testing.assert_close(found, whole[index])
    both = payload.select(index[:1]).join(payload.select(index[1:]))
    assert all(torch.equal(t, payload.select(index).tensors[name]) for name, t in both.tensors.items())
    assert fitted.retained == 3 / 8


@pytest.mark.parametrize("name", ["adaptive", "static"])
def test_more_kept_tokens_rebuild_better_and_beat_evicting(name):
    keys, values = pair(32, size=16)
    errors = []
    for kept in (2, 6, 12):
        fitted = codec(name, kept, size=16)
        found = fitted.decode(fitted.encode(keys, values))
        errors.append([float((a - b).norm() / b.norm()) for a, b in zip(found, (keys, values), strict=True)])
    assert errors == sorted(errors, reverse=True)
    evict = codec("evict", 6, size=16)
    lost = evict.decode(evict.encode(keys, values))[0]
    assert errors[1][0] < float((lost - keys).norm() / keys.norm())


@pytest.mark.parametrize("name", NAMES)
def test_module_bytes_and_round_trip_through_tensors(name):
    fitted = codec(name, 3)
    state = dict(fitted.state_dict())
    static = 3 * 8 + 4 * (8 * 3 + 8 + 8 * 3)
    sizes = {"static": static, "static-mlp": static + 4 * (32 * 3 + 32 + 5 * 32)}
    sizes |= dict.fromkeys(("adaptive", "evict", "heads"), 4 * (36 + 2 * 2 * 4) + 2 * (2 * 2 * 10))
    assert fitted.module_nbytes == sizes.get(name, sum(tensor.nbytes for tensor in state.values()))
    again = CODECS[name].from_tensors(state, (2, 8, 4), 3)
    keys, values = pair()
    for a, b in zip(
        again.decode(again.encode(keys, values)), fitted.decode(fitted.encode(keys, values)), strict=True
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", NAMES)
def test_malformed_tensors_are_refused(name):
    state = {key: tensor.clone() for key, tensor in codec(name, 3).state_dict().items()}
    for key, tensor in state.items():
        wrong = [tensor[..., :-1], tensor.to(torch.float16), tensor[None], -10 * tensor.abs() - 10]
        if tensor.is_floating_point():
            wrong.append(tensor * float("nan"))
        if key in ("mean", "value_mean", "key_map", "value_basis", "mlp_in", "mlp_bias", "mlp_out"):
            wrong.pop(3)  # any finite number will do there
        for bad in wrong:
            with pytest.raises(OptionError):
                CODECS[name].from_tensors({**state, key: bad}, (2, 8, 4), 3)
        with pytest.raises(OptionError, match="expected the tensors"):
            CODECS[name].from_tensors({k: t for k, t in state.items() if k != key}, (2, 8, 4), 3)
    with pytest.raises(OptionError, match="expected the tensors"):
        CODECS[name].from_tensors({**state, "more": torch.zeros(1)}, (2, 8, 4), 3)


def test_options_out_of_range_are_refused():
    for name in NAMES:
        for kept in (0, 9, -1):
            with pytest.raises(OptionError, match="keeps between"):
                codec(name, kept)
        has_ridge = "ridge" in signature(CODECS[name].fit).parameters
        for ridge in (0.0, 2.0, float("nan")) if has_ridge else ():
            with pytest.raises(OptionError, match="ridge"):
                codec(name, 3, ridge=ridge)
    with pytest.raises(OptionError, match="fit again"):
        codec("static", 3).resized(4)


def test_resized_equals_a_fit_at_that_size():
    keys, values = pair()
    for name in (*ADAPTIVE_PAIR, "heads"):
        a, b = codec(name, 3).resized(5), codec(name, 5)
        for x, y in zip(a.decode(a.encode(keys, values)), b.decode(b.encode(keys, values)), strict=True):
            assert torch.equal(x, y)
    assert isinstance(codec("static", 2), StaticCodec)
