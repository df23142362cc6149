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


def test_no_byte_of_an_item_can_change_unseen(tmp_path):
    path = tmp_path / "x.partial"
    for name in ("one", "two", "three"):
        Journal(path, {"model": "m"}).add(record(name))
    whole, first = path.read_bytes(), len(path.read_bytes().split(b"\n")[0]) + 1
    for place in range(first, len(whole) - 1):
        if whole[place : place + 1] not in b" \n":  # JSON with other spaces is the same
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
            with pytest.raises(OptionError, match=r"line [234] is damaged; delete that line"):
                Journal(path, {"model": "m"})
    path.write_bytes(b"\n".join(line for i, line in enumerate(whole.split(b"\n")) if i != 2))
    assert list(Journal(path, {"model": "m"}).done) == ["one", "three"]


def test_lines_of_another_run_are_refused(tmp_path):
    ours, theirs = tmp_path / "a.partial", tmp_path / "b.partial"
    Journal(theirs, {"model": "other"}).add(record("one"))
    Journal(ours, {"model": "m"}).add(record("two"))
    ours.write_bytes(ours.read_bytes() + theirs.read_bytes().split(b"\n")[1] + b"\n")
    with pytest.raises(OptionError, match="line 3"):
        Journal(ours, {"model": "m"})


def test_what_is_no_journal_stays(tmp_path):
    for text in ("my notes", "my notes\n", "[]\nmore"):
        (tmp_path / "x.partial").write_text(text)
        with pytest.raises(OptionError, match=r"x\.partial"):
            Journal(tmp_path / "x.partial", {"model": "m"})
        assert (tmp_path / "x.partial").read_text() == text


def test_what_cannot_be_written_is_told(tmp_path):
    (tmp_path / "a").mkdir()
    journal = Journal(tmp_path / "a" / "x", {})
    (tmp_path / "a" / "x").unlink()
    (tmp_path / "a").rmdir()
    with pytest.raises(OptionError, match="cannot write"):
        journal.add(record("one"))
    assert not journal.done


def test_no_folder(tmp_path):
    with pytest.raises(OptionError, match="cannot write"):
        Journal(tmp_path / "none" / "x.partial", {})
