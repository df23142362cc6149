"""A user's file of questions: what is read, and what is refused with file and line."""

from __future__ import annotations

import json
import sys

import pytest
from PIL import Image

from capsight.errors import OptionError
from capsight.evaluation import jsonl_items


@pytest.fixture
def write(tmp_path):
    Image.new("RGB", (56, 56)).save(tmp_path / "a.png")

    def made(content):
        path = tmp_path / "data.jsonl"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return made


def ask_of(path):
    (item,) = jsonl_items(path)
    return item.asks[0]


def line(**more):
    return json.dumps({"images": ["a.png"], "question": "what?", **more})


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({"answer": "x"}, ("x",)),
        ({"answer": ["x", "y", "x"]}, ("x", "y")),
        ({"answers": ["x", "y"]}, ("x", "y")),
        ({"answers": "x"}, ("x",)),
        ({"answer": 42}, ("42",)),
        ({"answer": [3.5, "three"]}, ("3.5", "three")),
        ({"answer": None, "task": None}, ()),
        ({"answer": None, "answers": ["x"]}, ("x",)),
        ({}, ()),
    ],
)
def test_answers(write, given, wanted):
    assert ask_of(write(line(**given))).references == wanted


def test_numbers_are_kept_as_they_are_written(write):
    text = '{"images": [], "question": "q", "answer": [3.50, 1e3, 12345678901234567890], "task": 7}'
    assert ask_of(write(text)).references == ("3.50", "1e3", "12345678901234567890")
    assert ask_of(write(text)).task == "7"


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_line_ends_and_marks(write, end, mark):
    strange = "a\u2028b\u2029c\x85d\x0be\x0cf"
    rows = [line(answer=strange), "", json.dumps({"images": [], "question": strange}, ensure_ascii=False)]
    rows.append("\ufeff" + line(answer="x"))
    items = list(jsonl_items(write(mark + end.join(rows).encode())))
    assert [item.asks[0].question for item in items] == ["what?", strange, "what?"]
    assert items[0].asks[0].answer == strange
    assert [item.name[-6:] for item in items] == ["line 1", "line 3", "line 4"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (line(answer=True), "answer is True"),
        (line(answer={"text": "x"}), "answer is {"),
        (line(answers=[["x"]]), "answers is [["),
        (line(answers=[{"answer": "x"}]), "answers is [{"),
        (line(answer=[]), "answer is empty"),
        (line(answer=["x", None]), "None"),
        (line(answer=""), "answer is ''"),
        (line(answer=" "), "answer is ' '"),
        (line(answer="x", answers=["x"]), "both answer and answers"),
        (line(answer="\ud800"), "ud800"),
        (line(question="\ud800"), "ud800"),
        (line(question=5), "question is '5'"),
        (line(question=None), "question is missing"),
        (line(images="a.png"), "images is 'a.png'"),
        (line(images=[5]), "images is"),
        (line(images=None), "images is missing"),
        (line(images=["none.png"]), "none.png"),
        (line(images=["\ud800.png"]), "images is"),
        (line(task=[1]), "task is"),
        (line(answer="x")[:-1], "delimiter"),
        ('{"images": [], "question": "q", "answer": NaN}', "NaN"),
        ('{"images": [], "question": "q", "answer": "a", "answer": "b"}', "twice"),
        ("[" * 100_000, "nested"),
        ('{"images": [], "question": "q", "answer": ' + "[" * 5000 + "]" * 5000 + "}", "nested"),
        ("[1]", "the line is ['1']"),
        ("5", "the line is"),
        (b'{"images": [], "question": "\xff"}', "not UTF-8"),
    ],
)
def test_refused_with_file_and_line(write, text, words):
    first = line(answer="x").encode() + b"\n\n"
    path = write(first + (text if isinstance(text, bytes) else text.encode()) + b"\n")
    items = jsonl_items(path)
    with pytest.raises(OptionError) as caught:
        list(items)
    said = str(caught.value)
    assert words in said
    assert "data.jsonl, line 3" in said
    assert "\n" not in said
    assert len(said) < 400


def test_other_files(tmp_path, write):
    for path in (tmp_path, tmp_path / "none.jsonl", tmp_path / "a\0b"):
        with pytest.raises(OptionError, match="cannot read"):
            list(jsonl_items(path))
    with pytest.raises(OptionError, match=r"line 1.*not UTF-8"):
        list(jsonl_items(write(line().encode("utf-16"))))
    assert list(jsonl_items(write(b""))) == []
    assert sys.getrecursionlimit() > 100
