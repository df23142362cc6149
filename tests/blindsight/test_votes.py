"""From losses to categories: votes, the recovery pass, and the loosest map within a tolerance."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from capsight.blindsight import Category, HeadMap, MaskOptions, Thresholds
from capsight.blindsight.calibrate.losses import Losses
from capsight.blindsight.calibrate.recovery import loosest, recover
from capsight.blindsight.calibrate.votes import Votes
from capsight.errors import CalibrationError, OptionError

DENSE, SINK = Category.DENSE, Category.SINK
INTRA, BOTH = Category.INTRA_IMAGE, Category.INTRA_IMAGE_SINK
OPTIONS = MaskOptions(own_window=4)


def decide(shares, **gammas):
    chosen = Thresholds((0.1, 0.1), **({"gamma_d": 0.25, "gamma_s": 0.75, "gamma_i": 0.75} | gammas))
    votes = Votes(1, 1)
    for good in shares:
        votes.add(torch.tensor([0.0 if x else 1.0 for x in good]).view(1, 3, 1))
    return votes.decide(chosen)[0][0]


def test_votes():
    """Columns: Sink, Intra-Image, Intra-Image+Sink good enough for the prompt."""
    assert decide([(1, 1, 1)] * 4) is SINK
    assert decide([(1, 1, 1)] * 3 + [(0, 0, 1)]) is SINK
    assert decide([(0, 1, 1)] * 4) is INTRA
    assert decide([(1, 0, 1)] * 2 + [(0, 1, 1)] * 2) is BOTH
    assert decide([(1, 1, 1)] * 2 + [(0, 0, 0)] * 2) is DENSE
    assert decide([(1, 1, 1)] * 2 + [(0, 0, 0)] * 2, gamma_d=0.5, gamma_s=0.5) is SINK


def test_alpha_is_linear_in_depth():
    assert Thresholds((0.1, 0.3), 0, 0, 0).alphas(3).tolist() == pytest.approx([0.1, 0.2, 0.3])


@pytest.mark.parametrize("wrong", [{"alpha": (-1.0, 0.0)}, {"gamma_d": 1.5}, {"gamma_s": -0.1}])
def test_thresholds_out_of_range(wrong):
    with pytest.raises(OptionError):
        Thresholds(**({"alpha": (0.1, 0.1), "gamma_d": 0, "gamma_s": 0, "gamma_i": 0} | wrong))


def voted(lost):
    votes, losses = Votes(2, 4), Losses(2, 4)
    votes.add(lost)
    losses.add(lost)
    return losses, HeadMap(votes.decide(Thresholds((1.0, 1.0), 0.1, 0.9, 0.9)))


def test_recovery_returns_the_worst_heads_first():
    lost = torch.arange(8).view(2, 1, 4).expand(2, 3, 4) / 10
    losses, head_map = voted(lost)

    def drop(candidate):
        return sum(
            losses.of(layer, head, category)
            for layer, heads in enumerate(candidate.categories)
            for head, category in enumerate(heads)
        )

    found, measured = recover(head_map, losses, drop, tolerance=1.05)
    assert found.categories == ((SINK,) * 4, (SINK, DENSE, DENSE, DENSE))
    assert measured == pytest.approx(drop(found))
    assert measured <= 1.05
    assert recover(head_map, losses, drop, tolerance=9.0)[0] == head_map
    assert recover(head_map, losses, drop, tolerance=0.0)[0].counts()[DENSE] >= 7
    tied, _ = recover(head_map, losses, drop, tolerance=1.05, group=2)
    assert tied.categories == ((SINK,) * 4, (DENSE,) * 4)


def test_recovery_wants_a_drop():
    losses, head_map = voted(torch.zeros(2, 3, 4))
    with pytest.raises(CalibrationError, match="dense model itself"):
        recover(head_map, losses, lambda candidate: 0.9, tolerance=0.1)


@settings(max_examples=30)
@given(st.integers(1, 6), st.integers(0, 99), st.tuples(*[st.sampled_from((0.1, 0.5, 0.9))] * 3))
def test_maps_change_at_the_change_points_and_nowhere_else(count, seed, gammas):
    g = torch.Generator().manual_seed(seed)
    votes, thresholds = Votes(2, 3), Thresholds((0.0, 0.0), *gammas)
    for _ in range(count):
        votes.add(torch.rand(2, 3, 3, generator=g))

    def at(alpha):
        return votes.decide(replace(thresholds, alpha=(alpha, alpha)))

    points = votes.change_points(thresholds)
    assert points == sorted(set(points))
    assert at(points[0] * (1 - 1e-5)) == ((DENSE,) * 3,) * 2
    for low, high in pairwise([*points, 1.1]):
        assert at(low) == at((low + high) / 2) == at(high * (1 - 1e-5) if high - low > 1e-4 else low)


def test_the_loosest_map_within_the_tolerance():
    """A drop that rises by one with every head that is not Dense; heads turn sparse one after the other."""
    votes, gammas, seen = Votes(2, 4), Thresholds((0.0, 0.0), 0.1, 0.9, 0.9), []
    votes.add(torch.arange(8).view(2, 1, 4).expand(2, 3, 4) / 10)

    def drop(head_map):
        seen.append(head_map)
        return 8.0 - head_map.counts()[DENSE]

    for tolerance in range(9):
        seen.clear()
        found, measured, thresholds = loosest(votes, gammas, OPTIONS, drop, tolerance)
        assert found.counts()[SINK] == measured == tolerance
        assert found.options == OPTIONS
        assert found in seen
        assert len(seen) <= 9
        if tolerance:
            assert thresholds.alpha == (pytest.approx((tolerance - 1) / 10),) * 2
            assert HeadMap(votes.decide(thresholds), OPTIONS) == found
    with pytest.raises(CalibrationError, match="dense model itself"):
        loosest(votes, gammas, OPTIONS, lambda candidate: 0.9, 0.1)


def test_a_drop_that_rises_unevenly_hides_no_looser_map():
    """One answer of a hundred makes a map fail here and pass there."""
    votes, gammas, seen = Votes(8, 8), Thresholds((0.0, 0.0), 0.1, 0.9, 0.9), []
    votes.add(torch.arange(64).view(8, 1, 8).expand(8, 3, 8) / 100)

    def drop(head_map):
        seen.append(head_map)
        sparse = 64 - head_map.counts()[DENSE]
        return float(sparse > 58 or 20 < sparse < 40)

    found, measured, _ = loosest(votes, gammas, OPTIONS, drop, 0.0)
    assert (found.counts()[SINK], measured) == (58, 0.0)
    assert len(seen) <= 6
