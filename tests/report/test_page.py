"""The page: its sections, what is left out, and that it is one file."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from base64 import b64encode
from dataclasses import replace

import pytest

from capsight.errors import OptionError
from capsight.kvcapsule.budget import LayerNeeds
from capsight.report import BenchFile, EvalFile, Material, build_report, read
from report import samples

SECTIONS = ["accuracy", "by-images", "by-task", "speed", "ttft", "bench", "demo", "head-map",
            "attention", "budgets", "errors", "machine"]  # fmt: skip


def sections(page: str) -> list[str]:
    return re.findall(r'<section id="([^"]+)"', page)


def test_all_sections_in_order(everything):
    assert sections(build_report(everything)) == SECTIONS


@pytest.mark.parametrize(
    ("without", "gone"),
    [
        ({"bench": None}, {"speed", "ttft", "bench"}),
        ({"demo": None}, {"demo"}),
        ({"evaluations": ()}, {"accuracy", "by-images", "by-task"}),
        ({"head_map": None, "capsule": None, "errors": None}, {"head-map", "budgets", "errors"}),
        ({"attention": ()}, {"attention"}),
    ],
)
def test_what_is_missing_leaves_no_trace(everything, without, gone):
    page = build_report(replace(everything, **without))
    assert sections(page) == [name for name in SECTIONS if name not in gone]
    assert "None" not in page


def test_every_picture_is_well_formed_and_ids_are_unique(everything):
    page = build_report(everything)
    pictures = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert len(pictures) == 16  # eight for a desk, the same for a phone
    for picture in pictures:
        ET.fromstring(picture)
        assert "#0550ae" not in picture
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    for target in re.findall(r'(?:url\(|href=")#([^")]+)', page):
        assert target in ids


def test_nothing_points_outside(everything):
    page = build_report(everything)
    assert not re.search(r"<script|<iframe|@import|url\((?!#)", page)
    assert all(link.startswith(("#", "data:")) for link in re.findall(r'(?:src|href)="([^"]*)"', page))


def test_text_of_the_files_is_escaped(everything):
    page = build_report(everything)
    assert "<b>most</b>" not in page
    assert "&lt;b&gt;most&lt;/b&gt;" in page


def test_attention_pictures_are_in_the_page_itself(everything):
    page = build_report(everything)
    png = everything.attention[0].png
    assert f'src="data:image/png;base64,{b64encode(png).decode()}" width="256" height="256"' in page
    assert "layer 1, head 2 (sink); layer 3, head 0 (&lt;dense&gt;)</figcaption>" in page


def test_what_layers_need_is_drawn_where_the_capsule_knows_it(everything):
    needs = LayerNeeds((16, 32), ((0.4, 0.2),) * 8, (0.5,) * 8)
    page = build_report(replace(everything, capsule=replace(everything.capsule, needs=needs)))
    assert "Reconstruction error of each layer" in page
    assert "Reconstruction error of each layer" not in build_report(everything)


def test_the_demo_has_both_ways_to_decode(everything):
    page = build_report(everything)
    assert re.search(
        r"capsules, 40% retained</td><td>4.2 MB</td>.*?<td>37 \(0.46x\)</td><td>74 \(0.93x\)</td>", page
    )


def test_the_same_files_give_the_same_page(everything):
    assert build_report(everything) == build_report(everything)


def test_several_evaluations(everything, tmp_path):
    within = read(EvalFile, samples.write(tmp_path, "within", samples.eval_json("within")))
    page = build_report(replace(everything, evaluations=(*everything.evaluations, within)))
    assert sections(page)[:6] == [
        f"{name}-{n}" for n in (1, 2) for name in ("accuracy", "by-images", "by-task")
    ]
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))


def test_a_bench_of_one_batch_and_length_has_its_table_only(tmp_path):
    values = samples.bench_json()
    values["rows"] = [row for row in values["rows"] if (row["batch"], row["images"]) == (1, 4)]
    page = build_report(Material(bench=read(BenchFile, samples.write(tmp_path, "b", values))))
    assert sections(page) == ["bench", "machine"]


def test_an_evaluation_of_the_full_cache_alone_beside_a_demo(everything, tmp_path):
    values = samples.eval_json()
    values["methods"] = {"full": values["methods"]["full"]}
    only = read(EvalFile, samples.write(tmp_path, "full", values))
    page = build_report(Material(evaluations=(only,), demo=everything.demo))
    assert "On one prompt of 6 images" in page
    assert sections(page) == ["accuracy", "by-images", "by-task", "demo", "machine"]


def test_nothing_to_report(everything):
    with pytest.raises(OptionError, match="nothing to report"):
        build_report(Material(head_map=everything.head_map))
    with pytest.raises(OptionError, match=r"'magic'.*adaptive.*heads"):
        build_report(Material(evaluations=everything.evaluations), method="magic")
