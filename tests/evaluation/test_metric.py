"""Measures of right answers, against values worked out from their papers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from capsight.errors import OptionError
from capsight.evaluation import METRICS, Ask, Item, evaluate, summary
from capsight.evaluation.metric import check_metric, levenshtein, score


@pytest.mark.parametrize(
    ("metric", "answer", "references", "wanted"),
    [
        ("exact", " The  Total ", ["the total"], 1),
        ("exact", "42", ["41", "42"], 1),
        ("exact", "the total.", ["total"], 0),
        ("normalised", "The total.", ["total"], 1),
        ("normalised", "a U.S. dollar", ["us dollar"], 1),
        ("normalised", "theatre", ["atre"], 0),
        ("anls", "hallo", ["hello"], 0.8),
        ("anls", "HELLO ", ["hello", "x"], 1),
        ("anls", "ab", ["cd"], 0),
        ("anls", "ab", ["ax"], 0),  # half of it is wrong: nothing
        ("anls", "abc", ["abx"], 1 - 1 / 3),
        ("relaxed", "104", ["100"], 1),
        ("relaxed", "105", ["100"], 1),
        ("relaxed", "105.1", ["100"], 0),
        ("relaxed", "-96", ["-100"], 1),
        ("relaxed", "5%", ["0.05"], 1),
        ("relaxed", "5 %", ["5.1%"], 1),
        ("relaxed", "5", ["5%"], 0),
        ("relaxed", "0", ["0"], 1),
        ("relaxed", "0.0", ["0"], 0),
        ("relaxed", "Red", ["red"], 1),
        ("relaxed", "nan", ["nan"], 1),
        ("relaxed", "2010", ["2009", "blue"], 1),
    ],
)
def test_values(metric, answer, references, wanted):
    assert score(answer, references, metric) == pytest.approx(wanted)


def test_without_a_reference_there_is_no_score():
    assert all(score("x", (), metric) is None for metric in METRICS)
    with pytest.raises(OptionError, match="anls"):
        check_metric("bleu")


@given(st.text("ab", max_size=6), st.text("ab", max_size=6))
def test_levenshtein_is_the_recursive_definition(a, b):
    def plain(a, b):
        if not a or not b:
            return len(a) + len(b)
        return min(plain(a[1:], b) + 1, plain(a, b[1:]) + 1, plain(a[1:], b[1:]) + (a[0] != b[0]))

    assert levenshtein(a, b) == plain(a, b)


@pytest.fixture(scope="module")
def reference():
    import capsight

    return capsight.load_reference_vlm()


def test_evaluate_scores_by_the_metric_and_leaves_out_what_has_no_answer(reference):
    from capsight.evaluation import reference_items

    drawn = [(item, ask) for item in reference_items("calibration", 1, 4) for ask in item.asks]
    item, ask = max(drawn, key=lambda pair: len(pair[1].answer))
    model, processor = reference
    said = {}
    items = [
        Item("a", item.images, (ask,)),
        Item("b", item.images, (Ask(ask.question, "no such thing", "all", (ask.answer,)),)),
        Item("c", item.images, (Ask(ask.question, ""),)),
        Item("d", item.images, (Ask(ask.question, ask.answer[:-1] + "~", "near"),)),
    ]
    for metric in ("exact", "anls"):
        results = evaluate(
            model, processor, items, {}, metric=metric,
            on_item=lambda item, answers: said.update({item.name: answers["full"].texts[0]}),
        )  # fmt: skip
        rights = [outcome.right for outcome in results["full"].outcomes]
        full = summary(results)["full"]
        assert (full["questions"], full["unscored"]) == (3, 1)
        assert rights == [score(said[i.name], i.asks[0].references, metric) for i in items]
        assert rights[0] == rights[1] == 1
        assert full["exact_match"] == pytest.approx(
            100 * sum(r for r in rights if r is not None) / 3, abs=0.01
        )
        assert set(full["by"]["task"]) == {"all", "near", ask.task}
    assert rights[3] > 0
    alone = summary(evaluate(model, processor, [items[2]], {}))["full"]
    assert (alone["exact_match"], alone["questions"], alone["by"], alone["agreement"]) == (None, 0, {}, 100)
