from __future__ import annotations

import pytest

from capsight.errors import OptionError
from capsight.evaluation import Journal
from capsight.evaluation.record import ItemRecord, MethodRecord


def record(name: str) -> ItemRecord:
    row = MethodRecord(["a", "é"], [True, False], [True, True], [0.0, 0.25], 10, 20)
    return ItemRecord(name, 3, ["find", "plate"], {"full": row, "adaptive 0.4": row})


def test_goes_on_where_it_was(tmp_path):
    path = tmp_path / "x.partial"
    first = Journal(path, {"model": "m", "retained": (0.4, 0.2)})
    first.add(record("one"))
    first.add(record("two"))
    again = Journal(path, {"model": "m", "retained": (0.4, 0.2)})
    assert again.done == {"one": record("one"), "two": record("two")}
    again.add(record("three"))
    assert list(Journal(path, {"model": "m", "retained": (0.4, 0.2)}).done) == ["one", "two", "three"]
    again.remove()
    assert not path.exists()


@pytest.mark.parametrize("lost", [1, 30, 10_000])
def test_a_line_cut_short_is_dropped(tmp_path, lost):
    path = tmp_path / "x.partial"
    journal = Journal(path, {"model": "m"})
    journal.add(record("one"))
    journal.add(record("two"))
    data = path.read_bytes()
    path.write_bytes(data[: max(len(data) - lost, 3)])
    again = Journal(path, {"model": "m"})
    assert list(again.done) == (["one"] if lost < 10_000 else [])
    again.add(record("two"))
    assert "two" in Journal(path, {"model": "m"}).done


def test_other_settings_are_refused(tmp_path):
    path = tmp_path / "x.partial"
    Journal(path, {"model": "m", "samples": 3})
    with pytest.raises(OptionError, match="samples"):
        Journal(path, {"model": "m", "samples": 4})
    with pytest.raises(OptionError, match="dtype"):
        Journal(path, {"model": "m", "samples": 3, "dtype": "float32"})


def test_damage_is_named(tmp_path):
    path = tmp_path / "x.partial"
    journal = Journal(path, {"model": "m"})
    journal.add(record("one"))
    path.write_text(path.read_text().replace('"images": 3', '"images') + "{}\n")
    with pytest.raises(OptionError, match="line 2"):
        Journal(path, {"model": "m"})


def test_no_folder(tmp_path):
    with pytest.raises(OptionError, match="cannot write"):
        Journal(tmp_path / "none" / "x.partial", {})
