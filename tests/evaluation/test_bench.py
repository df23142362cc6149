from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from capsight.cli.bench import _with_ratios
from capsight.evaluation.bench import peak_bytes
from capsight.evaluation.bench_row import BenchRow

FULL = BenchRow("full", None, 4, 8, 1000, 0.2, 100.0, 8000, 0, 0.001, 9000)
OURS = BenchRow("adaptive", 0.4, 4, 8, 1000, 0.25, 80.0, 4000, 400, 0.01, None)


def test_ratios_count_modules():
    assert OURS.ratios(FULL, FULL) == {"ttft": 1.25, "tokens_per_s": 0.8, "bytes": 0.55}
    assert FULL.ratios(FULL, FULL)["peak_bytes"] == 1.0
    assert (OURS.name, FULL.name) == ("adaptive 0.4", "full")


def test_decode_speed_is_beside_the_fastest_full_cache():
    fastest = replace(FULL, compiled=True, tokens_per_s=160.0, ttft_s=9.0)
    assert OURS.ratios(FULL, fastest) == {"ttft": 1.25, "tokens_per_s": 0.5, "bytes": 0.55}
    assert (fastest.name, fastest.label) == ("full, compiled", "full")
    rows = [FULL, fastest, OURS, replace(FULL, batch=1), replace(OURS, batch=1, compiled=True)]
    ratios = [row["ratios"]["tokens_per_s"] for row in _with_ratios(rows, None)]
    assert ratios == [0.625, 1.0, 0.5, 1.0, 0.8]


@pytest.mark.parametrize(("budget", "ours", "full"), [(20_000, 19, 10), (399, 0, 0), (2000, 1, 1)])
def test_largest_batch(budget, ours, full):
    assert OURS.largest_batch(budget) == ours
    assert FULL.largest_batch(budget) == full


def test_bytes_that_were_not_measured():
    row = BenchRow("full", None, 1, 1, 10, 0.1, 1.0, None)
    with pytest.raises(ValueError, match="bytes"):
        row.largest_batch(10)
    assert set(row.ratios(row, row)) == {"ttft", "tokens_per_s"}


def test_peak_sees_what_was_held_and_given_back():
    size = 64 * 2**20

    def work():
        torch.ones(size, dtype=torch.uint8)

    found = peak_bytes(work, torch.device("cpu"))
    assert found is None or 0.8 * size < found < 2 * size
