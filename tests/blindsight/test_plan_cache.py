"""Plans are made once, and old ones go when they are many or large."""

import torch

from blindsight.layouts import prompt
from capsight.blindsight import BaseRule, Category, MaskOptions
from capsight.blindsight.attention import plan_cache
from capsight.blindsight.attention.segment_plan import segment_plan
from capsight.blindsight.attention.work import Work
from capsight.blindsight.spans import Chunk

CPU = torch.device("cpu")


class Plan:
    def __init__(self, nbytes):
        self.nbytes = nbytes


def works(count):
    row = prompt(8, 8)
    return [
        Work(row, Category.SINK, MaskOptions(own_window=i + 1), BaseRule(), Chunk(0, 0, row.length))
        for i in range(count)
    ]


def made(sizes):
    calls = []

    @plan_cache.remembered
    def make(work, device):
        calls.append(work)
        return Plan(sizes)

    return make, calls


def test_a_plan_is_made_once():
    make, calls = made(1)
    first, second = works(2)
    assert make(first, CPU) is make(first, CPU)
    assert make(first, CPU) is not make(second, CPU)
    assert calls == [first, second]


def test_the_plans_used_longest_ago_go_first(monkeypatch):
    monkeypatch.setattr(plan_cache, "PLANS", 2)
    make, calls = made(1)
    a, b, c = works(3)
    for work in (a, b, a, c, a, b):
        make(work, CPU)
    assert calls == [a, b, c, b]


def test_large_plans_are_few(monkeypatch):
    monkeypatch.setattr(plan_cache, "BYTES", 250)
    make, calls = made(100)
    a, b, c = works(3)
    for work in (a, b, c, b, c, a):
        make(work, CPU)
    assert calls == [a, b, c, a]
    monkeypatch.setattr(plan_cache, "BYTES", 50)
    assert make(b, CPU) is make(b, CPU)  # however large


def test_a_plan_knows_its_masks():
    row = prompt(300, 300)
    dense = Work(row, Category.DENSE, MaskOptions(), BaseRule(), Chunk(0, 500, row.length))
    assert segment_plan(dense, CPU).nbytes == (row.length - 500) * row.length
