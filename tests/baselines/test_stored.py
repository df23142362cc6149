"""Methods that store other numbers than kept tokens: merging, feature PCA, quantisation."""

from __future__ import annotations

import math

import pytest
import torch

import capsight
from baselines.conftest import greedy, method, mixed_batch
from capsight.baselines import METHODS, QuantoInt2, QuantoInt4
from capsight.baselines.feature_pca import PCACodec
from capsight.baselines.merge import MergeCodec
from capsight.errors import CapsightError, OptionError, UnsupportedModelError
from capsight.kvcapsule.plan import Run
from tiny import FAMILIES

RUNS = (Run(0, 0), Run(0, 8))


def kv() -> tuple[torch.Tensor, torch.Tensor]:
    keys, values = torch.randn(2, 2, 3, 8, 4, generator=torch.Generator().manual_seed(0))  # [M, H, N, D]
    return keys, values


@pytest.mark.parametrize("log_count", [True, False])
def test_merging_is_the_mean_of_groups(log_count):
    keys, values = kv()
    codec = MergeCodec(8, 3, log_count)
    payload = codec.encode_runs(keys, values, RUNS)
    bias = codec.bias(payload)
    groups = {1: (0, 3), 3: (3, 5), 6: (5, 8)}  # where the mean stands, and what it is of
    for x, found in zip((keys, values), codec.decode(payload), strict=True):
        for n in range(8):
            part = x[:, :, slice(*groups[n])].mean(2) if n in groups else torch.zeros(2, 3, 4)
            torch.testing.assert_close(found[:, :, n], part)
    for n in range(8):
        size = groups[n][1] - groups[n][0] if n in groups else 0
        expected = torch.tensor(float(size)).log() if log_count or not size else torch.tensor(0.0)
        assert torch.allclose(bias[:, 0, n], expected)


def test_log_counts_make_merging_equal_tokens_exact():
    keys, values = (x[:, :, :1].expand(-1, -1, 8, -1) for x in kv())
    codec = MergeCodec(8, 3, True)
    payload = codec.encode_runs(keys, values, RUNS)
    merged_keys, merged_values = codec.decode(payload)
    query, other = torch.randn(2, 3, 1, 4), torch.randn(2, 2, 3, 5, 4)
    outputs = []
    for k, v, bias in (
        (keys, values, torch.zeros(2, 1, 8)),
        (merged_keys, merged_values, codec.bias(payload)),
    ):
        scores = query @ torch.cat([k, other[0]], 2).mT + torch.nn.functional.pad(bias, (0, 5))[:, :, None]
        outputs.append(scores.softmax(-1) @ torch.cat([v, other[1]], 2))
    torch.testing.assert_close(outputs[0], outputs[1])


def test_feature_pca_is_the_best_projection_of_its_rank():
    g = torch.Generator().manual_seed(0)
    low = torch.randn(2, 50, 3, 8, 2, generator=g) @ torch.randn(1, 1, 3, 2, 4, generator=g)  # rank 2 of 4
    low += torch.randn(2, 1, 3, 1, 4, generator=g)
    x = low.transpose(1, 2).flatten(2, 3)  # [2, H, M * N, D]
    mean = x.mean(2, keepdim=True)
    axes = torch.linalg.eigh((x - mean).mT @ (x - mean)).eigenvectors.flip(-1)
    codec = PCACodec(8, 4, mean, axes)
    payload = codec.encode_runs(low[0], low[1], ())
    assert payload.nbytes == low.nbytes // 2
    for found, expected in zip(codec.decode(payload), low, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_feature_pca_fits_what_the_model_caches(qwen):
    errors = []
    for retained in (0.25, 0.75):
        with capsight.enable(qwen.model, capsule=method("feature-pca", qwen, retained)) as fast:
            inputs = mixed_batch(qwen)
            cache = fast.encapsulate(**inputs)
            logits = greedy(fast.generate, past_key_values=cache, **inputs).logits[0]
        errors.append((logits - greedy(qwen.model.generate, **inputs).logits[0]).abs().max())
    assert errors[1] < errors[0]
    assert method("feature-pca", qwen, 0.25).module_nbytes < method("feature-pca", qwen, 0.5).module_nbytes


@pytest.mark.parametrize("kind", [QuantoInt4, QuantoInt2])
def test_quantised_cache(qwen, kind):
    pytest.importorskip("optimum.quanto")
    inputs = mixed_batch(qwen)
    with capsight.enable(qwen.model, capsule=kind()) as fast:
        cache = fast.encapsulate(**inputs)
        assert greedy(fast.generate, past_key_values=cache, **inputs).logits[0].isfinite().all()
        cache = fast.encapsulate(**inputs)
        full = cache.nbytes_full
        cache.batch_select_indices(torch.tensor([0, 2]))
        cache.batch_repeat_interleave(2)
        assert cache.nbytes_full < 2 * full
        assert len(cache.layers[0]._dequantize(cache.layers[0]._quantized_keys)) == 4


def test_rows_that_beams_have_moved(qwen):
    pytest.importorskip("optimum.quanto")
    inputs = mixed_batch(qwen)
    with capsight.enable(qwen.model, capsule=QuantoInt4()) as fast:
        cache = fast.encapsulate(**inputs)
        layer = cache.layers[1]
        before = layer._dequantize(layer._quantized_values)
        cache.reorder_cache(torch.tensor([2, 0, 1]))
        cache.batch_select_indices(torch.tensor([0, 2]))
        cache.reorder_cache(torch.tensor([1, 1]))
        new = torch.ones(2, *before.shape[1:2], 1, before.shape[3])
        _, found = layer.update(new, new)
    torch.testing.assert_close(found[:, :, :-1], before[[1, 1]], atol=0.05, rtol=0)


def test_quantised_bytes(qwen):
    pytest.importorskip("optimum.quanto")
    inputs = qwen.inputs([([qwen.picture(0)], "what is this?")])
    text = qwen.config.get_text_config()
    channels = text.num_key_value_heads * text.hidden_size // text.num_attention_heads
    for kind in (QuantoInt4, QuantoInt2):
        with capsight.enable(qwen.model, capsule=kind()) as fast:
            cache = fast.encapsulate(**inputs)
        length, group = cache.get_seq_length(), math.gcd(64, channels)
        assert cache.nbytes_full == 4 * 2 * text.num_hidden_layers * length * channels
        # keys are filled up to whole groups of tokens; each group has a scale and a shift in float32
        numbers = text.num_hidden_layers * channels * (length + math.ceil(length / group) * group)
        assert cache.nbytes == numbers * kind.bits / 8 + numbers / group * 8


@pytest.mark.parametrize("kind", [QuantoInt4, QuantoInt2])
def test_a_large_key_channel_does_not_hurt_the_others(qwen, kind):
    """KIVI's reason to quantise keys by channel; transformers' default loses the small channels to it."""
    pytest.importorskip("optimum.quanto")
    text = qwen.config.get_text_config()
    size = text.hidden_size // text.num_attention_heads
    keys = torch.randn(1, text.num_key_value_heads, 71, size, generator=torch.Generator().manual_seed(0))
    keys[..., 3] = 100 + keys[..., 3]
    layer = kind().cache(qwen.inputs([([qwen.picture(0)], "hi")]), qwen.config).layers[0]
    layer.update(keys, keys)
    held = layer._dequantize(layer._quantized_keys)
    assert held.shape == keys.shape
    assert (held - keys)[..., 4:].abs().max() < (1.5 if kind.bits == 2 else 0.4)


def test_quantised_cache_refuses_sliding_layers(qwen):
    pytest.importorskip("optimum.quanto")
    gemma = FAMILIES["gemma3"]()
    with (
        pytest.raises(UnsupportedModelError, match="full-attention"),
        capsight.enable(gemma.model, capsule=QuantoInt4()),
    ):
        pass


def test_quantised_cache_without_quanto_says_what_to_install(qwen, monkeypatch):
    monkeypatch.setattr("capsight.baselines.quantized.is_optimum_quanto_available", lambda: False)
    with pytest.raises(OptionError, match="pip install"), capsight.enable(qwen.model, capsule=QuantoInt4()):
        pass
    with pytest.raises(CapsightError, match="pip install"):
        QuantoInt4().cache(mixed_batch(qwen), qwen.config)


def test_registry_names_and_papers():
    for name, kind in METHODS.items():
        assert kind.name == name
        if name != "uniform":
            assert "https://arxiv.org/abs/" in kind.__doc__
