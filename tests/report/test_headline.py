"""The first sentence says what the numbers say."""

from __future__ import annotations

import pytest

from capsight.report import BenchFile, DemoFile, EvalFile, read, sections
from capsight.report.headline import chosen_row, headline
from report import samples


@pytest.fixture
def evaluation(tmp_path):
    return lambda values: read(EvalFile, samples.write(tmp_path, "e", values))


def test_the_smallest_row_within_a_point_speaks(evaluation):
    file = evaluation(samples.eval_json())
    assert chosen_row(file, "heads").name == "heads 0.4"
    assert chosen_row(file, "snapkv").name == "snapkv 0.6"  # none is within a point: the least drop
    assert chosen_row(file, "magic") is None


def test_gain_and_cost_with_speed(evaluation, tmp_path):
    bench = read(BenchFile, samples.write(tmp_path, "b", samples.bench_json()))
    found = headline(evaluation(samples.eval_json()), bench, None, "heads")
    sentence = found.sentence.replace("\xa0", " ")
    assert sentence == (
        "With heads, keeping 40 % of each image's keys and values: you gain a KV cache 2.3x smaller and "
        "1.08x the decode speed; it costs 0.9 points of right answers (95.0 % against 95.9 %, could be "
        "chance) and 1.03x the time to the first token."
    )
    assert [tile.value for tile in found.tiles] == ["2.3x", "−0.9", "1.08x", "1.03x"]


def test_a_better_answer_is_a_gain_and_a_slower_decode_a_cost(evaluation, tmp_path):
    values, timings = samples.eval_json(), samples.bench_json()
    values["methods"]["heads 0.4"] |= {"drop": -0.4}
    for row in timings["rows"]:
        row["tokens_per_s"] = 100 if row["method"] == "full" else 70
    bench = read(BenchFile, samples.write(tmp_path, "b", timings))
    sentence = headline(evaluation(values), bench, None, "heads").sentence
    gains, costs = sentence.split("; it costs ")
    assert "0.4 points of right answers" in gains
    assert "0.70x the decode speed" in costs


@pytest.mark.parametrize("retained", [0.4, 0.35])
def test_a_slower_decode_is_said_whatever_was_timed(evaluation, tmp_path, retained):
    values, timings = samples.eval_json(), samples.bench_json()
    for row in timings["rows"]:
        row["tokens_per_s"] = 100 if row["method"] == "full" else 70
        row["retained"] = retained if row["retained"] else None
    bench = read(BenchFile, samples.write(tmp_path, "b", timings))
    demo = read(DemoFile, samples.write(tmp_path, "d", samples.demo_json()))
    for file, said in ((bench, "0.70x the decode speed"), (None, "0.93x the decode speed")):
        found = headline(evaluation(values), file, demo, "heads")
        assert said in found.sentence.split("; it costs ")[1]
        assert said.split()[0] in [tile.value for tile in found.tiles]
    assert "(speed and time of the demo)" in found.sentence
    other = headline(evaluation(values), bench, demo, "heads").sentence
    assert ("(speed and time of heads 0.35)" in other) == (retained == 0.35)
    assert "0.93x the decode speed" in headline(None, None, demo, "heads").sentence


def test_no_difference_is_called_none(evaluation):
    values = samples.eval_json()
    values["methods"]["heads 0.4"] |= {"drop": 0.0, "exact_match": 95.9, "p_value": 1.0}
    found = headline(evaluation(values), None, None, "heads")
    assert "it costs no right answers (95.9" in found.sentence
    assert found.tiles[1].value == "0.0"


def test_demo_and_bench_alone(tmp_path):
    demo = read(DemoFile, samples.write(tmp_path, "d", samples.demo_json()))
    assert "2.1x smaller and 1 of 2 answers are right, against 2" in headline(None, None, demo, "x").sentence
    values = samples.bench_json()
    faster = [row | {"decode": "latent", "tokens_per_s": 1e6} for row in values["rows"] if row["retained"]]
    values["rows"] += faster  # with other bytes than those of the evaluation: not for the headline
    bench = read(BenchFile, samples.write(tmp_path, "b", values))
    assert "1.08x the decode speed" in headline(None, bench, None, "heads").sentence
    assert bench.names() == ["full", "heads 0.4", "heads 0.4 latent"]
    assert headline(None, bench, None, "magic") is None


def test_the_fastest_steps_are_compared(tmp_path):
    values = samples.bench_json()
    for row in [*values["rows"]]:
        speed = row["tokens_per_s"] * (2 if row["method"] == "full" else 3)
        values["rows"].append(row | {"compiled": True, "tokens_per_s": speed, "ttft_s": 99})
    bench = read(BenchFile, samples.write(tmp_path, "b", values))
    assert bench.names() == ["full", "full, compiled", "heads 0.4", "heads 0.4, compiled"]
    sentence = headline(None, bench, None, "heads").sentence
    assert "1.62x the decode speed" in sentence  # 1.08 * 3 / 2
    assert "1.03x the time to the first token" in sentence


def test_one_image_is_no_images(tmp_path):
    demo = read(DemoFile, samples.write(tmp_path, "d", samples.demo_json() | {"images": 1}))
    assert "1 image the" in headline(None, None, demo, "heads").sentence
    assert "1 image that" in sections.demo(demo).lead
