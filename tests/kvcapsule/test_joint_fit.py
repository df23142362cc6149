"""What the joint codec is made of: stored bits, rotations, the sample of tokens, the axes of a fit."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from capsight.errors import OptionError
from capsight.kvcapsule.calibration import joint_fit
from capsight.kvcapsule.calibration.token_sample import TokenSample
from capsight.kvcapsule.codecs.levels import GROUP, Levels, distortions, pack, share_bits, unpack
from capsight.kvcapsule.codecs.rotary import Rotary

groups = st.integers(0, 3).map(lambda n: n * GROUP)


ROTARY = Rotary(torch.tensor([0.5, 0.01]).double(), torch.tensor([0, 2]), False, 1.0)


def plainly(z: torch.Tensor, bits: int) -> torch.Tensor:
    """One group of one token, number by number."""
    numbers = z.tolist()
    if bits == 2:
        scale = float(torch.tensor(sum(x * x for x in numbers) / len(numbers)).sqrt().half())
        points = [p * scale for p in (-1.5104, -0.4528, 0.4528, 1.5104)]
        return torch.tensor([min(points, key=lambda p: abs(p - x)) for x in numbers])
    top = 2 ** (bits - 1) - 1
    scale = float((z.abs().max() / top).half())
    return torch.tensor([max(-top, min(top, round(x / scale))) * scale for x in numbers])


@given(groups, groups, groups, st.integers(1, 5), st.integers(0, 99))
def test_latents_come_back_as_the_plain_quantiser_gives_them(eight, four, two, tokens, seed):
    levels = Levels(eight, four, two)
    z = torch.randn(tokens, max(levels.rank, 1), generator=torch.Generator().manual_seed(seed))[
        :, : levels.rank
    ]
    if not levels.rank:
        return
    codes, scales = pack(z, levels)
    assert codes.nbytes + scales.nbytes == tokens * levels.nbytes
    found = unpack(codes, scales, levels, torch.float32)
    kinds = [b for b, n in levels.parts for _ in range(n // GROUP)]
    for token in range(tokens):
        for group, bits in enumerate(kinds):
            own = slice(group * GROUP, (group + 1) * GROUP)
            torch.testing.assert_close(found[token, own], plainly(z[token, own], bits), atol=2e-3, rtol=1e-3)


def test_more_bytes_never_lose_more_and_are_not_exceeded():
    z = torch.randn(200, 256, generator=torch.Generator().manual_seed(1)) * torch.linspace(8, 0.1, 256)
    lost = distortions(z)
    before = float("inf")
    for nbytes in (10, 20, 40, 80, 160, 300):
        levels = share_bits(lost, nbytes)
        assert levels.nbytes <= nbytes
        error = (unpack(*pack(z, levels), levels, torch.float32) - z[:, : levels.rank]).square().sum()
        error += z[:, levels.rank :].square().sum()
        assert float(error) <= before * 1.001
        before = float(error)
    with pytest.raises(OptionError, match="hold no latent"):
        share_bits(lost, 5)


@pytest.mark.parametrize("interleaved", [False, True])
def test_keys_are_turned_back(interleaved):
    rotary = Rotary(torch.tensor([1.0, 0.1, 0.003]).double(), torch.tensor([0, 1, 2]), interleaved, 1.5)
    keys = torch.randn(2, 7, 8)  # two channels are not turned
    positions = torch.randint(0, 500, (3, 7))
    tables = rotary.tables(positions)
    turned = rotary.turn(keys, *tables)
    torch.testing.assert_close(rotary.unturn(turned, *tables), keys)
    a, b = (0, 1) if interleaved else (0, 3)
    angle = positions[0, 4].double()
    expected = 1.5 * (keys[1, 4, a] * angle.cos() - keys[1, 4, b] * angle.sin())
    torch.testing.assert_close(turned[1, 4, a], expected.float())
    torch.testing.assert_close(turned[..., 6:], keys[..., 6:])


def test_a_token_sample_is_the_same_in_parts_and_can_be_joined():
    tokens = torch.randn(300, 8)
    whole, parts = TokenSample(), TokenSample()
    whole.add(tokens[:100], 0), whole.add(tokens[100:], 1)
    parts.add(tokens[:100], 0)
    resumed = TokenSample()
    resumed.restore(parts.state())
    resumed.add(tokens[100:], 1)
    assert torch.equal(whole.tokens, resumed.tokens)
    torch.testing.assert_close(whole.mean, tokens.mean(0))
    other = TokenSample()
    other.add(tokens[100:], 1)
    parts.join(other)
    assert parts.seen == 300
    assert torch.equal(parts.tokens, whole.tokens)
    torch.testing.assert_close(parts.mean, tokens.mean(0))


@pytest.mark.parametrize("spectrum", ["short", "long"])
def test_more_axes_where_the_usual_ones_lose_too_much(monkeypatch, spectrum):
    monkeypatch.setattr(joint_fit, "USUAL_RANK", 32)
    monkeypatch.setattr(joint_fit, "MOST_RANK", 96)
    sizes = torch.arange(1, 129).float() ** (-3.0 if spectrum == "short" else -0.5)
    turned = torch.linalg.qr(torch.randn(128, 128, generator=torch.Generator().manual_seed(0)))[0]
    tokens = (torch.randn(600, 128, generator=torch.Generator().manual_seed(1)) * sizes) @ turned
    rotary = Rotary(torch.ones(4, dtype=torch.float64), torch.zeros(4, dtype=torch.int64), False, 1.0)
    fit = partial(joint_fit.solve_joint, tokens.mean(0), tokens.half(), (0, 1), (4, 8), rotary)
    codecs = fit(None)
    assert len(codecs[0].whole()["axes"]) == (32 if spectrum == "short" else 96)
    assert (float(codecs[0].typical) <= joint_fit.LOST) == (spectrum == "short")
    assert len(fit(64)[0].whole()["axes"]) == 64


def test_what_images_usually_lose_is_not_measured_on_the_few_tokens_of_the_fit():
    tokens = torch.randn(120, 256, generator=torch.Generator().manual_seed(0))
    codec = joint_fit.solve_joint(tokens.mean(0), tokens.half(), (0, 1), (8, 8), ROTARY, 128)[0]
    assert float(codec.typical) > 0.5  # of noise, 90 tokens hold no more than their share
    many = torch.randn(2000, 256, generator=torch.Generator().manual_seed(0))
    codec = joint_fit.solve_joint(many.mean(0), many.half(), (0, 1), (8, 8), ROTARY, 128)[0]
    assert 0.2 < float(codec.typical) < 0.5
