"""What judges said, kept by question, and the page and choices made of it."""

from __future__ import annotations

import pytest
from judges_choice import without_judge, without_kind
from judges_page import counterpart, page
from judges_record import Record
from judges_sections import smallest
from PIL import Image

from capsight.evaluation import Ask, Item, MethodResult, Outcome

KINDS = ("count", "ground")


def items(count: int) -> list[Item]:
    picture = Image.new("RGB", (4, 4))
    return [Item(f"i{i}", (picture,), tuple(Ask("?", "a", kind) for kind in KINDS)) for i in range(count)]


def result(count: int, wrong: tuple[int, ...] = (), share: float = 1.0) -> MethodResult:
    outcomes = [
        Outcome(f"i{i // 2}", KINDS[i % 2], 1, float(i not in wrong), True, 0.0) for i in range(2 * count)
    ]
    return MethodResult(outcomes, int(1000 * share), 1000, 50)


@pytest.fixture
def record(tmp_path) -> Record:
    made = Record(tmp_path / "judges")
    rows = {"full": result(8), "joint 0.1": result(8, (0,), 0.11), "joint 0.4": result(8, (), 0.41)}
    made.add("mosaic", "test", items(8), rows, {})
    rows = {"full": result(4), "cur 0.1": result(4, (1, 3, 5, 7), 0.12), "kivi-2": result(4, (), 0.2)}
    made.add("mosaic", "test", items(4), rows, {})
    return made


def test_methods_are_compared_on_what_both_were_asked(record) -> None:
    judged = record.judges("test")["mosaic"]
    assert judged.methods == ["full", "joint 0.1", "joint 0.4", "cur 0.1", "kivi-2"]
    assert judged.pair("full", "full").questions == 16
    pair = judged.pair("joint 0.1", "cur 0.1")
    assert (pair.points, pair.questions) == (-37.5, 8)
    assert pair.p == pytest.approx(0.375)
    assert judged.worst("cur 0.1") == ("ground", 100.0)
    assert judged.percent("cur 0.1", ["count"]) == 100
    assert judged.share("joint 0.1") == 0.11
    assert judged.share("joint 0.1", modules=True) == 0.11 + 0.05 * 8


def test_what_was_asked_is_not_asked_again(record) -> None:
    assert record.asked("mosaic", "test", "joint 0.1", items(8))
    assert record.asked("mosaic", "test", "cur 0.1", items(4))
    assert not record.asked("mosaic", "test", "cur 0.1", items(8))
    assert not record.asked("mosaic", "dev", "cur 0.1", items(4))
    assert not record.asked("tiles", "test", "full", items(4))


def test_a_method_without_a_budget_is_compared_at_no_more_bytes(record) -> None:
    judged = record.judges("test")["mosaic"]
    assert counterpart(judged, "kivi-2") == "joint 0.1"
    assert counterpart(judged, "cur 0.1") == "joint 0.1"
    assert counterpart(judged, "joint 0.1") is None


def test_the_page_says_where_joint_is_behind(record) -> None:
    rows = {"full": result(8), "joint 0.2": result(8, tuple(range(0, 16, 2)), 0.2), "cur 0.2": result(8)}
    record.add("tiles", "test", items(8), rows, {})
    text = page(record.judges("test"))
    assert "- `mosaic`: of 2 rows of other methods `joint` is ahead of 0 and behind 0" in text
    assert "Behind `cur 0.2` by 50.0 points" in text
    assert "| `cur 0.1` | ground, 100.0 | 8 | 50.0 |" in text


def test_a_choice_does_not_see_what_it_is_judged_by(tmp_path) -> None:
    made = Record(tmp_path / "judges")
    for name, small_wrong in (("mosaic", ()), ("tiles", (1, 3)), ("reference", ())):
        for split in ("dev", "test"):
            rows = {
                "full": result(8),
                "joint 0.1": result(8, (), 0.1),
                "joint 0.01": result(8, small_wrong, 0.01),
            }
            made.add(name, split, items(8), rows, {})
    dev, test = made.judges("dev"), made.judges("test")
    chosen = {row["left_out"]: row for row in without_judge(dev, test, ["joint 0.1", "joint 0.01"], 1.0)}
    assert chosen["tiles"]["chosen"] == "joint 0.01"  # the others lose nothing by it
    assert chosen["tiles"]["lost"] == 12.5
    assert chosen["mosaic"]["chosen"] == "joint 0.1"
    kinds = {
        (r["left_out"], r["judge"]): r for r in without_kind(dev, test, ["joint 0.1", "joint 0.01"], 1.0)
    }
    assert kinds["ground", "tiles"]["chosen"] == "joint 0.01"
    assert kinds["ground", "tiles"]["lost"] == 25
    assert kinds["count", "tiles"]["chosen"] == "joint 0.1"
    text = "\n".join(smallest(dev, test))
    assert "every judge is 0.1: vision tokens in 1/10" in text
    assert "**`joint 0.1`**" in text
