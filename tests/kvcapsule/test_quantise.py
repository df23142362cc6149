"""Numbers in 8 and 4 bits: the error is half a step at most, whatever the numbers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from capsight.errors import OptionError
from capsight.kvcapsule.codecs.quantise import Quantised, dequantise, quantise

SHAPES = arrays.array_shapes(min_dims=4, max_dims=4, min_side=1, max_side=4)
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    """[M, r, H, D] of any dtype: constant channels, outliers and denormal numbers among them."""
    dtype = draw(st.sampled_from(DTYPES))
    largest = {torch.float16: 6e4}.get(dtype, 1e30)
    x = torch.tensor(
        draw(arrays.arrays("float64", SHAPES, elements=st.floats(-largest, largest) | st.floats(-2, 2)))
    )
    if draw(st.booleans()):
        x[..., 0] = draw(st.floats(-100, 100))
    return x.to(dtype)


@settings(max_examples=100)
@given(tensors(), st.sampled_from([8, 4]), st.sampled_from([1, 3]))
def test_the_error_is_half_a_step_and_rounding(x, bits, axis):
    q = quantise(x, bits, axis)
    found = dequantise(q, bits, x.shape[-1])
    assert found.dtype == q.step.dtype == q.low.dtype == x.dtype
    assert found.shape == x.shape
    groups = [1 if i == axis else n for i, n in enumerate(x.shape)]
    assert list(q.step.shape) == list(q.low.shape) == groups
    assert q.levels.dtype == torch.uint8
    assert q.levels.shape[-1] == (x.shape[-1] if bits == 8 else (x.shape[-1] + 1) // 2)
    kind = torch.finfo(x.dtype)
    work = torch.finfo(torch.promote_types(x.dtype, torch.float32))
    tiny = 2**bits * kind.tiny * kind.eps  # below that a step is no number; all are the smallest one
    spread = x.double().amax(axis, keepdim=True) - x.double().amin(axis, keepdim=True)
    assert (q.step.double() <= spread / (2**bits - 1) * (1 + kind.eps) + (spread <= tiny) + kind.tiny).all()
    assert (q.step > 0).all()
    size = x.double().abs().amax(axis, keepdim=True)
    bound = q.step.double() / 2 * (1 + 512 * work.eps) + size * kind.eps + tiny
    assert ((found.double() - x.double()).abs() <= bound).all()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_constants_and_ends_are_exact(bits, dtype):
    x = torch.full((2, 5, 1, 3), 7.25, dtype=dtype)
    assert torch.equal(dequantise(quantise(x, bits, 1), bits, 3), x)
    x[:, 2] = -1000.0  # an outlier in each channel: its group is coarse, its ends stay
    found = dequantise(quantise(x, bits, 1), bits, 3)
    assert torch.equal(found[:, 2], x[:, 2])
    torch.testing.assert_close(found, x, rtol=8e-3, atol=torch.finfo(dtype).eps * 2000)


def test_an_outlier_channel_hurts_its_own_channel_only():
    x = torch.rand(1, 26, 2, 8, generator=torch.Generator().manual_seed(0))
    x[..., 3] *= 1000
    errors = [(dequantise(quantise(x, 4, axis), 4, 8) - x).abs()[..., :3].max() for axis in (1, 3)]
    assert errors[0] < 0.04
    assert errors[1] > 0.5


@pytest.mark.parametrize("bits", [8, 4])
def test_no_blocks_and_odd_sizes(bits):
    for shape in ((0, 3, 2, 5), (2, 1, 1, 1), (1, 3, 1, 5)):
        x = torch.randn(shape)
        found = dequantise(quantise(x, bits, 1), bits, shape[-1])
        assert found.shape == x.shape
        torch.testing.assert_close(found, x, atol=0.3, rtol=0)


def test_four_bits_take_half_a_byte():
    x = torch.randn(3, 7, 2, 16)
    assert quantise(x, 4, 1).levels.nbytes == x.numel() // 2
    assert quantise(x, 8, 1).levels.nbytes == x.numel()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_not_hidden(bad):
    x = torch.randn(1, 5, 1, 4)
    x[0, 2, 0, 1] = bad
    found = dequantise(quantise(x, 8, 1), 8, 4)
    assert not found[..., 1].isfinite().any()
    assert found[..., [0, 2, 3]].isfinite().all()


@pytest.mark.parametrize("bits", [2, 16, 0, -4])
def test_other_bits_are_refused(bits):
    with pytest.raises(OptionError, match="8 or 4 bits"):
        quantise(torch.zeros(1, 1, 1, 1), bits, 1)


def test_fields_are_named_as_files_name_them():
    assert Quantised._fields == ("levels", "step", "low")
