"""Latents at rest: what the entropy coder gives back, what cosines do to images, what steps cost."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from capsight.errors import CapsuleFileError, OptionError
from capsight.kvcapsule.codecs import entropy
from capsight.kvcapsule.codecs.levels import GROUP, distortions, rate_of
from capsight.kvcapsule.rest.latents import code, decode
from capsight.kvcapsule.rest.spatial import transformed

GRIDS = st.lists(st.tuples(*[st.integers(1, 4)] * 3), min_size=1, max_size=3)


def smooth(grids, seed=0):
    """Latents [T, 64] of images whose neighbouring tokens are alike, and what bits cost on such."""
    g = torch.Generator().manual_seed(seed)
    blocks = []
    for t, h, w in grids:
        y, x = torch.meshgrid(torch.linspace(0, 1, h), torch.linspace(0, 1, w), indexing="ij")
        waves = torch.randn(3, 2 * GROUP, generator=g)
        plane = waves[0] + y[..., None] * waves[1] + x[..., None] * waves[2]
        blocks.append(plane.expand(t, h, w, -1).reshape(-1, 2 * GROUP))
    latents = torch.cat(blocks) * torch.logspace(0, -1, 2 * GROUP)
    return latents, distortions(latents)


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


@given(GRIDS, st.integers(0, 99))
def test_cosines_keep_lengths_and_go_back(grids, seed):
    tokens = sum(map(math.prod, grids))
    x = torch.randn(tokens, 5, generator=torch.Generator().manual_seed(seed)).double()
    there = transformed(x, grids)
    torch.testing.assert_close(there.norm(dim=0), x.norm(dim=0))
    torch.testing.assert_close(transformed(there, grids, back=True), x)
    flat = transformed(torch.ones(tokens, 1).double(), grids)
    assert int((flat.abs() > 1e-9).sum()) == len(grids)  # an even image is one number


@given(GRIDS, st.sampled_from([0.9, 0.98]), st.booleans(), st.integers(0, 9))
def test_what_comes_back_is_as_far_off_as_the_quality_says(grids, quality, places, seed):
    latents, lost = smooth(grids, seed)
    back = decode(code(latents, lost, quality, grids if places else ()), len(latents), latents.shape[1])
    step, rank = rate_of(lost, quality)
    assert float((back - latents)[:, :rank].norm()) <= 0.7 * step * math.sqrt(len(latents) * rank) + 1e-6
    assert not back[:, rank:].any()


def test_places_cost_fewer_bytes_where_neighbours_are_alike():
    latents, lost = smooth([(1, 12, 12)] * 2)
    with_places, without = (len(code(latents, lost, 0.98, grids)) for grids in ([(1, 12, 12)] * 2, ()))
    assert with_places < 0.6 * without
    noise = (
        torch.randn(144, 2 * GROUP, generator=torch.Generator().manual_seed(0))
        * (torch.arange(144) == 7)[:, None]
    )
    sizes = [len(code(noise, distortions(noise), 0.98, grids)) for grids in ([(1, 12, 12)], ())]
    assert sizes[0] == sizes[1]  # one odd token is left as it is


def test_changed_or_foreign_pieces_are_refused():
    latents, lost = smooth([(1, 3, 4)])
    piece = code(latents, lost, 0.98, [(1, 3, 4)])
    for at in range(len(piece)):
        with pytest.raises(CapsuleFileError):
            decode(piece[:at] + bytes([piece[at] ^ 4]) + piece[at + 1 :], 12, 64)
        with pytest.raises(CapsuleFileError):
            decode(piece[:at], 12, 64)
    with pytest.raises(CapsuleFileError, match="12 tokens"):
        decode(piece, 16, 64)
    assert decode(piece, 12, 32).shape == (12, 32)
    with pytest.raises(OptionError, match="finite"):
        code(latents * torch.nan, lost, 0.98)
