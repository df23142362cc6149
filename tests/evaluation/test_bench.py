from __future__ import annotations

import pytest
import torch

from capsight.evaluation.bench import peak_bytes
from capsight.evaluation.bench_row import BenchRow

FULL = BenchRow("full", None, 4, 8, 1000, 0.2, 100.0, 8000, 0, 0.001, 9000)
OURS = BenchRow("adaptive", 0.4, 4, 8, 1000, 0.25, 80.0, 4000, 400, 0.01, None)


def test_ratios_count_modules():
    assert OURS.ratios(FULL) == {"ttft": 1.25, "tokens_per_s": 0.8, "bytes": 0.55}
    assert FULL.ratios(FULL)["peak_bytes"] == 1.0
    assert (OURS.name, FULL.name) == ("adaptive 0.4", "full")


@pytest.mark.parametrize(("budget", "ours", "full"), [(20_000, 19, 10), (399, 0, 0), (2000, 1, 1)])
def test_largest_batch(budget, ours, full):
    assert OURS.largest_batch(budget) == ours
    assert FULL.largest_batch(budget) == full


def test_bytes_that_were_not_measured():
    row = BenchRow("full", None, 1, 1, 10, 0.1, 1.0, None)
    with pytest.raises(ValueError, match="bytes"):
        row.largest_batch(10)
    assert set(row.ratios(row)) == {"ttft", "tokens_per_s"}


def test_peak_sees_what_was_held_and_given_back():
    size = 64 * 2**20

    def work():
        torch.ones(size, dtype=torch.uint8)

    found = peak_bytes(work, torch.device("cpu"))
    assert found is None or 0.8 * size < found < 2 * size
