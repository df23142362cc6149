"""Selection rules, against plain loops."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from capsight.baselines import CUREviction, KVzip, SnapKV, StreamingLLM, UniformSubsample, VLCache
from capsight.baselines.choice import allocate, top_overall, top_per_head
from capsight.baselines.kept import KeptPayload
from capsight.baselines.seen import Seen
from capsight.kvcapsule.plan import Run

N, H, D = 8, 2, 4
RUNS = (Run(0, 3), Run(0, 11), Run(1, 5))


def blocks(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(3, H, N, D, generator=g), torch.randn(3, H, N, D, generator=g)


def kept_by(method, keys, values):
    return top_per_head(method.scores(keys, values, RUNS), RUNS, method.budgets(RUNS))


def test_uniform_keeps_equal_distances():
    keep = kept_by(UniformSubsample(0.5, N), *blocks())
    assert keep.equal(torch.tensor([0, 1] * 4, dtype=torch.bool).expand(3, H, N))
    assert kept_by(UniformSubsample(0.4, N), *blocks()).sum(2).eq(3).all()


def test_streaming_keeps_sinks_and_the_most_recent():
    keep = kept_by(StreamingLLM(0.5, N), *blocks())[:, 0].tolist()
    assert keep[0] == [True] * 4 + [False] * 4  # row 0: eight of sixteen, four of them sinks
    assert keep[1] == [False] * 4 + [True] * 4
    assert keep[2] == [True] * 4 + [False] * 4  # row 1: a budget of four, all of them sinks
    more = kept_by(StreamingLLM(0.75, N), *blocks())[2, 0].tolist()
    assert more == [True] * 4 + [False] * 2 + [True] * 2


def test_cur_keeps_the_largest_products_of_local_norms():
    size = 32  # two windows
    g = torch.Generator().manual_seed(0)
    keys, values = torch.randn(2, 3, H, size, D, generator=g)
    method, runs = CUREviction(0.25, size), (Run(0, 0), Run(0, size), Run(1, 0))
    keep = top_per_head(method.scores(keys, values, runs), runs, method.budgets(runs))
    for head in range(H):
        for row, indices in ((0, (0, 1)), (1, (2,))):
            scores = {}
            for m in indices:
                for n in range(size):
                    window = range(n // 16 * 16, n // 16 * 16 + 16)
                    score = 1.0
                    for x in (keys, values):
                        score *= float(x[m, head, n] @ x[m, head, n]) / sum(
                            float(x[m, head, w] @ x[m, head, w]) for w in window
                        )
                    scores[m, n] = score
            best = sorted(scores, key=scores.get, reverse=True)[: 8 * len(indices)]
            found = {(m, n) for m in indices for n in range(size) if keep[m, head, n]}
            assert found == set(best), row


def attention(query, key, mask, scaling):
    """Weights [B, Hq, Q, S] one number at a time."""
    b, hq, q, _ = query.shape
    h, s = key.shape[1:3]
    out = torch.zeros(b, hq, q, s)
    for row in range(b):
        for head in range(hq):
            for i in range(q):
                scores = torch.full((s,), -math.inf)
                for j in range(s):
                    if mask[row, 0, i, j]:
                        scores[j] = query[row, head, i] @ key[row, head // (hq // h), j] * scaling
                out[row, head, i] = scores.softmax(0) if mask[row].any() else 0
    return out.nan_to_num()


def seen(form: str = "bool", queries: int = 22, length: int = 22) -> tuple[Seen, torch.Tensor]:
    """Two rows of `length` tokens, the second padded by two, and their weights from the loop."""
    g = torch.Generator().manual_seed(1)
    query, key = torch.randn(2, 4, queries, D, generator=g), torch.randn(2, H, length, D, generator=g)
    pads = (0, 0) if form == "none" else (0, 2)
    real = torch.arange(length) >= torch.tensor(pads)[:, None]
    mask = torch.ones(queries, length, dtype=torch.bool).tril(length - queries) & real[:, None, None]
    given = {"bool": mask, "none": None, "float": torch.zeros(mask.shape).masked_fill(~mask, -1e9)}[form]
    return Seen(query, key, given, 0.5, pads), attention(query, key, mask, 0.5)


@pytest.mark.parametrize("form", ["bool", "float", "none"])
@pytest.mark.parametrize("queries", [22, 5])
def test_weights_and_means(form, queries, monkeypatch):
    monkeypatch.setattr("capsight.baselines.seen.CHUNK", 4)
    view, weights = seen(form, queries)
    firsts, length = (15, 18), 22
    mean = view.mean(firsts)
    for row in range(2):
        for head in range(H):
            for j in range(view.pads[row], length):
                values = [
                    weights[row, hq, i, j]
                    for hq in (2 * head, 2 * head + 1)
                    for i in range(queries)
                    if i + length - queries >= max(firsts[row], j, view.pads[row])
                ]
                expected = float(torch.stack(values).mean()) if values else 0.0
                assert mean[row, head, j].item() == pytest.approx(expected, abs=1e-5)


def test_snapkv_pools_the_mean_of_the_last_window(monkeypatch):
    monkeypatch.setattr("capsight.baselines.snapkv.WINDOW", 6)
    view, _ = seen()
    mean = view.mean((16, 16))
    scores = SnapKV(0.5, N).look(view, RUNS).scores
    for m, (row, start, _) in enumerate(RUNS):
        for n in range(N):
            near = mean[row, :, max(start + n - 2, 0) : start + n + 3].mean(-1)
            torch.testing.assert_close(scores[m, :, n], near)


def test_vl_cache_density_and_budgets(monkeypatch):
    monkeypatch.setattr("capsight.baselines.vl_cache.WINDOW", 1)
    view, weights = seen()
    found = VLCache(0.5, N).look(view, RUNS)
    for row, first in ((0, 19), (1, 13)):  # after the last run of the row
        large = visible = 0
        for i in range(first, 22):
            visible += i + 1 - view.pads[row]
            large += float((weights[row, :, i] >= 0.01 * weights[row, :, i].amax(-1, True)).sum()) / 4
        assert found.density[row].item() == pytest.approx(large / visible, abs=1e-5)
    torch.testing.assert_close(found.scores[2], view.mean((19, 13))[1, :, 5:13])
    dense, sparse = found, type(found)(found.scores, found.density / 4)
    first, second = VLCache(0.5, N).choose([dense, sparse], RUNS)
    assert first.sum() > second.sum()
    assert (first.sum((0, 2)) + second.sum((0, 2))).tolist() == [24, 24]  # 12 a layer on average, each head


def test_kvzip_takes_the_maximum_over_the_repeat():
    view, weights = seen(queries=11)
    view = Seen(view.query, view.key, view.mask, view.scaling, (0, 2))
    runs = (Run(0, 2), Run(1, 2))
    scores = KVzip(0.5, N).look(view, runs).scores
    for m, (row, start, _) in enumerate(runs):
        for head in range(H):
            own = weights[row, 2 * head : 2 * head + 2, view.pads[row] :, start : start + N]
            torch.testing.assert_close(scores[m, head], own.amax((0, 1)))


def test_top_overall_shares_a_row_over_layers_and_heads():
    scores = torch.rand(2, 3, H, N, generator=torch.Generator().manual_seed(0))
    keep = top_overall(scores, RUNS, {0: 6, 1: 3})
    for indices, count in (([0, 1], 6), ([2], 3)):
        own = scores[:, indices]
        least = own.flatten().sort(descending=True).values[count * 2 * H - 1]
        assert torch.equal(keep[:, indices], own >= least)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8), st.integers(1, 40), st.data())
def test_allocations_add_up(weights, cap, data):
    floor = data.draw(st.integers(0, cap))
    total = data.draw(st.integers(floor * len(weights), cap * len(weights)))
    shares = allocate(weights, total, floor, cap)
    assert sum(shares) == total
    assert all(floor <= share <= cap for share in shares)
    order = sorted(range(len(weights)), key=lambda i: weights[i])
    for a, b in itertools.pairwise(order):
        assert shares[a] <= shares[b] + 1


@given(st.integers(0, 99))
def test_packed_tokens_equal_masked_ones(seed):
    g = torch.Generator().manual_seed(seed)
    keys, values = blocks(seed)
    keep, less = torch.rand(2, 3, H, N, generator=g) > 0.5
    packed = KeptPayload.pack(keys, values, keep)
    assert torch.equal(packed.mask(N), keep)
    index = torch.randint(3, (5,), generator=g)
    pairs = {
        "thinned": (packed.thinned(less), KeptPayload.pack(keys, values, keep & less)),
        "selected": (packed.select(index), KeptPayload.pack(keys[index], values[index], keep[index])),
        "joined": (packed.join(packed), KeptPayload.pack(*(torch.cat([x, x]) for x in (keys, values, keep)))),
    }
    for name, (found, expected) in pairs.items():
        for part in expected.tensors:
            assert torch.equal(found.tensors[part], expected.tensors[part]), (name, part)
