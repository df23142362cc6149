"""Items shared out over processes give what one process gives."""

from __future__ import annotations

import os

import pytest

import capsight
from capsight.errors import CapsightError, OptionError
from capsight.evaluation import Ask, Item, Journal, evaluate, reference_items, summary
from capsight.evaluation.parallel import AHEAD, check_workers, in_order
from capsight.evaluation.record import ItemRecord


def items(count):
    return [Item(f"item {i}", (), (Ask("?", str(i)),)) for i in range(count)]


def record(item):
    return ItemRecord(item.name, os.getpid(), [], {})


@pytest.mark.parametrize("count", [0, 1, 20])
def test_records_come_in_order_from_other_processes(count):
    found = list(in_order(record, items(count), 2))
    assert [each.item for each in found] == [item.name for item in items(count)]
    assert os.getpid() not in {each.images for each in found}
    assert len({each.images for each in found}) <= 2


def test_items_are_taken_as_they_are_needed():
    taken = []

    def endless():
        for item in items(10**6):
            taken.append(item.name)
            yield item

    found = in_order(record, endless(), 2)
    assert next(found).item == "item 0"
    found.close()
    assert len(taken) == 2 * AHEAD + 1


def test_errors_of_workers_are_raised_here():
    def refuse(item):
        raise CapsightError(f"{item.name} is bad; leave it out")

    with pytest.raises(CapsightError, match="item 0 is bad; leave it out"):
        list(in_order(refuse, items(3), 2))


def test_a_worker_that_dies_is_told_of():
    with pytest.raises(CapsightError, match="fewer --workers"):
        list(in_order(lambda item: os._exit(9), items(3), 2))


def test_workers_that_cannot_be():
    check_workers(1, "cuda")
    for workers, device in ((0, "cpu"), (-1, "cpu"), (2, "cuda")):
        with pytest.raises(OptionError, match="workers"):
            check_workers(workers, device)


def test_evaluate_in_processes_is_evaluate(tmp_path):
    model, processor = capsight.load_reference_vlm()
    methods = {"heads": capsight.KVCapsule.from_pretrained("reference-heads").with_retained(0.1)}
    asked = list(reference_items("calibration", 1, 5))
    alone = evaluate(model, processor, asked, methods, max_new_tokens=3)
    evaluate(model, processor, asked[1:2], methods, max_new_tokens=3, journal=Journal(tmp_path / "j", {}))
    seen, journal = [], Journal(tmp_path / "j", {})
    shared = evaluate(
        model, processor, asked, methods, max_new_tokens=3, journal=journal, workers=2,
        on_item=lambda item, answers: seen.append(item.name),
    )  # fmt: skip
    assert seen == [item.name for item in asked]
    assert set(journal.done) == set(Journal(tmp_path / "j", {}).done) == set(seen)
    assert [each.item for each in shared["heads"].outcomes] == [each.item for each in alone["heads"].outcomes]
    mine, theirs = summary(shared), summary(alone)
    for name in ("full", "heads"):
        assert mine[name]["exact_match"] == theirs[name]["exact_match"]
        assert mine[name]["kv_bytes"] == theirs[name]["kv_bytes"]
        assert mine[name]["kl"] == pytest.approx(theirs[name]["kl"], abs=1e-4)
