"""Latents at rest: what the entropy coder gives back, and what steps cost."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from capsight.errors import CapsuleFileError, OptionError
from capsight.kvcapsule.codecs import entropy
from capsight.kvcapsule.codecs.levels import GROUP, distortions, rate_of
from capsight.kvcapsule.rest.latents import code, decode


def drawn(tokens, seed=0):
    """Latents [T, 64], and what bits cost on such."""
    g = torch.Generator().manual_seed(seed)
    sizes = torch.logspace(0, -1, 2 * GROUP)
    return torch.randn(tokens, 2 * GROUP, generator=g) * sizes, distortions(
        torch.randn(99, 2 * GROUP, generator=g) * sizes
    )


@given(st.integers(0, 999), st.integers(0, 9), st.integers(0, 40), st.sampled_from([0.01, 1, 30, 9000]))
def test_integers_come_back(seed, tokens, rank, size):
    """Rows and columns of any size, whole ones of nothing included."""
    g = np.random.default_rng(seed)
    rows = (
        g.laplace(size=(tokens, rank))
        * g.exponential(size, (1, rank))
        * 4.0 ** g.integers(-6, 3, (tokens, 1))
    )
    rows = rows.clip(-entropy.MOST, entropy.MOST).astype(np.int32) * (g.random((1, rank)) < 0.8)
    rows, top = rows.astype(np.int32), int(np.abs(rows).max(initial=0))
    assert np.array_equal(entropy.decode(entropy.encode(rows), tokens, rank, top), rows)


def test_rows_of_little_cost_little():
    """Blank paper: tokens that hardly differ from the mean."""
    g = np.random.default_rng(0)
    busy = g.laplace(size=(32, 64)) * 8
    rows = np.concatenate((busy, g.laplace(size=(96, 64)) * 0.1)).round().astype(np.int32)
    alone = len(entropy.encode(rows[:32].copy()))
    assert len(entropy.encode(rows)) < 1.15 * alone


@given(st.integers(0, 30), st.sampled_from([0.9, 0.98]), st.integers(0, 9))
def test_what_comes_back_is_as_far_off_as_the_quality_says(tokens, quality, seed):
    latents, lost = drawn(tokens, seed)
    back = decode(code(latents, lost, quality), tokens, latents.shape[1])
    step, rank = rate_of(lost, quality)
    assert tokens == 0 or float((back - latents)[:, :rank].abs().max()) <= 0.501 * step
    assert not back[:, rank:].any()


def test_foreign_pieces_are_refused():
    """Containers see to bytes that were changed; integers have a checksum besides."""
    latents, lost = drawn(12)
    piece = code(latents, lost, 0.98)
    for at in range(len(piece)):
        with pytest.raises(CapsuleFileError):
            decode(piece[:at], 12, 64)
    for at in range(16, len(piece) - 8):
        with pytest.raises(CapsuleFileError):
            decode(piece[:at] + bytes([piece[at] ^ 4]) + piece[at + 1 :], 12, 64)
    with pytest.raises(CapsuleFileError, match="12 tokens"):
        decode(piece, 16, 64)
    assert decode(piece, 12, 32).shape == (12, 32)
    with pytest.raises(OptionError, match="finite"):
        code(latents * torch.nan, lost, 0.98)
