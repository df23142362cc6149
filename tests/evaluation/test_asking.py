from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from PIL import Image

import capsight
from capsight.errors import OptionError
from capsight.evaluation import Ask, Item, Journal, ask_item, evaluate, jsonl_items, reference_items, summary
from capsight.runtime import enable


@pytest.fixture(scope="module")
def reference():
    return capsight.load_reference_vlm()


@pytest.mark.parametrize("images", [1, 3])
def test_both_protocols_agree_on_the_full_cache(reference, images):
    model, processor = reference
    for item in reference_items("calibration", images, 2):
        with enable(model) as fast:
            after, within = (ask_item(fast, processor, item, p) for p in ("after", "within"))
        assert after.texts == within.texts
        assert (after.first_logits - within.first_logits).abs().max() < 1e-3
        assert after.nbytes.kv == after.nbytes.kv_full > 0 == after.nbytes.states


def test_questions_do_not_see_each_other(reference):
    model, processor = reference
    item = next(iter(reference_items("calibration", 2, 1)))
    with enable(model) as fast:
        together = ask_item(fast, processor, item)
        for i, ask in enumerate(item.asks):
            alone = ask_item(fast, processor, Item("alone", item.images, (ask,)))
            assert (alone.first_logits[0] - together.first_logits[i]).abs().max() < 1e-3


def test_capsules_are_judged_only_after(reference):
    model, processor = reference
    capsule = capsight.KVCapsule.from_pretrained("reference-heads").with_retained(0.1)
    item = next(iter(reference_items("calibration", 2, 1)))
    logits = {}
    for name, used in (("full", None), ("capsule", capsule)):
        with enable(model, capsule=used) as fast:
            for protocol in ("after", "within"):
                logits[name, protocol] = ask_item(fast, processor, item, protocol).first_logits
    assert torch.allclose(logits["full", "within"], logits["capsule", "within"], atol=1e-3)
    assert (logits["full", "after"] - logits["capsule", "after"]).abs().max() > 1e-2


def test_evaluate_pairs_methods_with_the_full_cache(reference):
    model, processor = reference
    capsule = capsight.KVCapsule.from_pretrained("reference-heads")
    items = list(reference_items("calibration", 2, 3))
    seen = []
    results = evaluate(
        model,
        processor,
        items,
        {"all": capsule.with_retained(1.0), "few": capsule.with_retained(0.05)},
        on_item=lambda item, answers: seen.append((item.name, sorted(answers))),
    )
    report = summary(results)
    assert [name for name, _ in seen] == [i.name for i in items]
    assert report["all"]["agreement"] == 100.0
    assert report["all"]["drop"] == 0.0
    assert report["few"]["kl"] > report["all"]["kl"]
    assert report["few"]["kv_bytes"] < report["full"]["kv_bytes"] == report["few"]["kv_bytes_full"]
    assert report["full"]["questions"] == sum(len(i.asks) for i in items)
    json.dumps(report)


def test_evaluate_goes_on_from_a_journal(reference, tmp_path):
    model, processor = reference
    items = list(reference_items("calibration", 1, 3))
    whole = evaluate(model, processor, items, {}, max_new_tokens=3)
    evaluate(model, processor, items[:2], {}, max_new_tokens=3, journal=Journal(tmp_path / "j", {}))
    asked = []
    again = evaluate(
        model, processor, items, {}, max_new_tokens=3, journal=Journal(tmp_path / "j", {}),
        on_item=lambda item, answers: asked.append(bool(answers)),
    )  # fmt: skip
    assert asked == [False, False, True]
    assert summary(again) == summary(whole)
    capsule = capsight.KVCapsule.from_pretrained("reference-heads")
    others = [replace(items[0], asks=items[0].asks * 2), *items[1:]]
    for given, methods in ((items, {"heads": capsule}), (others, {})):
        with pytest.raises(OptionError, match=f"journal holds {items[0].name} with other"):
            evaluate(model, processor, given, methods, journal=Journal(tmp_path / "j", {}))


def test_text_only_item(reference):
    model, processor = reference
    with enable(model) as fast:
        answers = ask_item(fast, processor, Item("text", (), (Ask("hello", ""),)))
    assert len(answers.texts) == 1


def test_unknown_protocol(reference):
    model, processor = reference
    item = next(iter(reference_items("calibration", 1, 1)))
    with enable(model) as fast, pytest.raises(OptionError, match="within"):
        ask_item(fast, processor, item, "before")


def test_jsonl(tmp_path):
    Image.new("RGB", (56, 56)).save(tmp_path / "a.png")
    file = tmp_path / "data.jsonl"
    file.write_text(
        '{"images": ["a.png"], "question": "what?", "answer": "x"}\n\n{"images": [], "question": "q"}\n'
    )
    first, second = jsonl_items(file)
    assert first.images[0].size == (56, 56)
    assert first.asks[0].answer == "x"
    assert second.images == ()


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "line 1"),
        ('{"question": "q"}', "images"),
        ('{"images": "a.png", "question": "q"}', "list"),
        ('{"images": ["none.png"], "question": "q"}', "none.png"),
    ],
)
def test_jsonl_errors_name_the_line(tmp_path, line, words):
    file = tmp_path / "data.jsonl"
    file.write_text(line + "\n")
    with pytest.raises(OptionError, match=words):
        list(jsonl_items(file))


def test_jsonl_missing(tmp_path):
    with pytest.raises(OptionError, match="cannot read"):
        list(jsonl_items(tmp_path / "none.jsonl"))
