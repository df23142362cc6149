from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from capsight.kvcapsule.codecs.whitening import RIDGE, deviation, is_whitening, whitened, whitening


@settings(max_examples=30)
@given(st.integers(1, 3), st.integers(1, 9), st.integers(0, 99))
def test_whitened_channels_are_white(heads, size, seed):
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(heads, size, size, dtype=torch.float64, generator=g) + 2 * torch.eye(size)
    x = torch.randn(6, heads, 40, size, dtype=torch.float64, generator=g) @ mix
    x = x - x.mean((0, 2), keepdim=True)
    flat = x.transpose(0, 1).flatten(1, 2)  # [H, M * N, D]
    covariance = flat.mT @ flat / flat.shape[1]
    packed = whitening(covariance)
    assert is_whitening(packed, size)
    both = whitened(x, 3 * x, torch.stack([packed, packed / 3]))
    torch.testing.assert_close(both[0], both[1], atol=1e-4, rtol=1e-4)
    out = both[0].double().transpose(0, 1).flatten(1, 2)
    found = out.mT @ out / out.shape[1]
    nugget = RIDGE * covariance.diagonal(dim1=1, dim2=2).mean(1)
    low = torch.linalg.cholesky(covariance + nugget[:, None, None] * torch.eye(size))
    expected = torch.linalg.solve(low, torch.linalg.solve(low, covariance).mT)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert (found.diagonal(dim1=1, dim2=2) <= 1 + 1e-4).all()
    usual = (covariance.diagonal(dim1=1, dim2=2) + nugget[:, None]).sqrt()
    torch.testing.assert_close(deviation(packed, size).double(), usual, atol=0, rtol=1e-4)


def test_a_dead_head_stays_finite():
    packed = whitening(torch.zeros(2, 4, 4, dtype=torch.float64))
    assert torch.isfinite(packed).all()
    nothing = torch.zeros(1, 2, 3, 4)
    assert whitened(nothing, nothing, packed.expand(2, -1, -1)).abs().sum() == 0


def test_a_turned_triangle_is_no_whitening():
    packed = whitening(torch.eye(3, dtype=torch.float64)[None])
    assert not is_whitening(-packed, 3)
