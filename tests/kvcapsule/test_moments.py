from __future__ import annotations

import pytest
import torch

from capsight.errors import CalibrationError
from capsight.kvcapsule.codecs.moments import LayerMoments, rms
from kvcapsule.conftest import blocks


def test_moments_are_those_of_all_samples_together():
    x = blocks(5, 2, 6, 3).double()
    sums = LayerMoments(2, 6, 3)
    for part in x.split(2):
        sums.update(part, 2 * part)
    mean = x.mean((0, 2))  # [H, D]
    for head in range(2):
        channels = (x[:, head] - mean[head]).transpose(1, 2).reshape(-1, 6)  # [M * D, N]
        expected = sum(torch.outer(v, v) for v in channels) / len(channels)
        torch.testing.assert_close(sums.keys.about(mean[:, None])[head], expected)
    torch.testing.assert_close(sums.keys.channel_mean(), mean)
    for head in range(2):
        expected = torch.cov(x[:, head].flatten(0, 1).T, correction=0)
        torch.testing.assert_close(sums.keys.channel_covariance()[head], expected)
        torch.testing.assert_close(sums.values.channel_covariance()[head], 4 * expected)
    torch.testing.assert_close(sums.values.token_mean(), 2 * x.mean((0, 1, 3)))
    assert sums.blocks == 5


def test_low_precision_input_is_accumulated_in_float64():
    x = torch.full((4, 1, 2, 1), 1.0, dtype=torch.bfloat16)
    sums = LayerMoments(1, 2, 1)
    for _ in range(200):
        sums.update(x, x)
    assert sums.keys.second.dtype == torch.float64
    assert sums.keys.second[0, 0, 1] == 800


def test_merge_equals_one_pass():
    one, two, both = (LayerMoments(2, 6, 3) for _ in range(3))
    a, b = blocks(3, 2, 6, 3, 1), blocks(4, 2, 6, 3, 2)
    one.update(a, a)
    two.update(b, b)
    both.update(torch.cat([a, b]), torch.cat([a, b]))
    one.merge(two)
    torch.testing.assert_close(one.keys.second, both.keys.second)
    torch.testing.assert_close(one.values.total, both.values.total)
    torch.testing.assert_close(one.keys.channels, both.keys.channels)
    assert one.blocks == 7
    with pytest.raises(CalibrationError, match="merge"):
        one.merge(LayerMoments(2, 5, 3))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_inf_are_refused_and_leave_the_sums_alone(bad):
    sums, good, poisoned = LayerMoments(2, 6, 3), blocks(2, 2, 6, 3), blocks(2, 2, 6, 3)
    poisoned[1, 1, 2, 2] = bad
    for pair in ((poisoned, good), (good, poisoned)):
        with pytest.raises(CalibrationError, match="NaN or infinite"):
            sums.update(*pair)
    assert sums.blocks == 0
    assert not sums.keys.second.any()


def test_wrong_shapes_are_refused():
    sums, good = LayerMoments(2, 6, 3), blocks(2, 2, 6, 3)
    for bad in (good[0], good[:, :1], good[:, :, :5], good[:1]):
        with pytest.raises(CalibrationError, match="shape"):
            sums.update(good, bad)


def test_scale_of_a_dead_head_is_one():
    assert rms(torch.zeros(2, 4, 4)).tolist() == [1, 1]
