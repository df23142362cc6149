"""Methods that share one prefill and check the full cache's answers say what they say on their own."""

from __future__ import annotations

import pytest
import torch

import capsight
from capsight.baselines import METHODS
from capsight.blindsight import Category, HeadMap
from capsight.errors import OptionError
from capsight.evaluation import FULL, Ask, Item, ask_item, evaluate, reference_items
from capsight.evaluation.prefill import Prefill
from capsight.evaluation.sharing import FULL_SPARSE, Asking
from capsight.runtime import enable
from tiny import FAMILIES


@pytest.fixture(scope="module")
def reference():
    return capsight.load_reference_vlm()


@pytest.fixture(scope="module")
def methods():
    capsule = capsight.KVCapsule.from_pretrained("reference-heads")
    chosen = {
        "adaptive": capsule.with_retained(0.2),
        "evict": capsule.with_codec("evict").with_retained(0.05),
        "snapkv": METHODS["snapkv"](0.1),
        "kvzip": METHODS["kvzip"](0.1),
        "merge": METHODS["merge"](0.1),
    }
    return chosen


@pytest.fixture(scope="module")
def item():
    return next(iter(reference_items("calibration", 3, 1, first=5)))


def alone(reference, method, item, protocol, head_map=None):
    model, processor = reference
    with enable(model, capsule=method, head_map=head_map, prefill="sparse") as fast, torch.no_grad():
        return ask_item(fast, processor, item, protocol, 12)


@pytest.mark.parametrize("protocol", ["after", "within"])
def test_sharing_changes_no_answer(reference, methods, item, protocol):
    model, processor = reference
    with torch.no_grad():
        shared = dict(Asking(model, processor, methods, protocol, max_new_tokens=12).ask(item))
    assert list(shared) == [FULL, *methods]
    for name, ours in shared.items():
        own = alone(reference, methods.get(name), item, protocol)
        assert ours.texts == own.texts, name
        assert (ours.first_logits - own.first_logits).abs().max() < 2e-3, name
        if protocol == "after":
            assert ours.nbytes == own.nbytes, name
    if protocol == "after":
        assert shared["evict"].texts != shared[FULL].texts  # so that wrong drafts were seen, too


def test_head_map_concerns_all_but_the_full_cache(reference, methods, item):
    model, processor = reference
    text = model.config.get_text_config()
    categories = ((Category.SINK,) * text.num_attention_heads,) * text.num_hidden_layers
    head_map = HeadMap(categories)
    chosen = {name: methods[name] for name in ("adaptive", "snapkv")}
    with torch.no_grad():
        shared = dict(Asking(model, processor, chosen, "after", head_map, 12).ask(item))
    assert list(shared) == [FULL, FULL_SPARSE, *chosen]
    for name, ours in shared.items():
        own = alone(reference, chosen.get(name), item, "after", None if name == FULL else head_map)
        assert ours.texts == own.texts, name
    assert (shared[FULL].first_logits - shared[FULL_SPARSE].first_logits).abs().max() > 1e-2


def test_the_model_is_left_as_it_was(reference, methods, item):
    model, processor = reference
    before = model.config.get_text_config()._attn_implementation
    evaluate(model, processor, [item], methods, max_new_tokens=2)
    assert model.config.get_text_config()._attn_implementation == before
    assert not model._forward_hooks


def test_one_token_is_enough(reference, methods, item):
    model, processor = reference
    for protocol in ("after", "within"):
        results = evaluate(model, processor, [item], {"few": methods["evict"]}, protocol, max_new_tokens=1)
        assert len(results["few"].outcomes) == len(item.asks)


def test_text_alone(reference, methods):
    model, processor = reference
    results = evaluate(model, processor, [Item("text", (), (Ask("hello", ""),))], methods, max_new_tokens=3)
    assert all(result.outcomes[0].agrees for result in results.values())


def test_taken_name(reference, methods):
    model, processor = reference
    with pytest.raises(OptionError, match="taken"):
        Asking(model, processor, {"full": methods["merge"]})


@pytest.mark.parametrize("family", ["gemma3", "qwen3_vl", "llava_onevision", "idefics3", "qwen3_5"])
def test_sharing_in_other_families(family, monkeypatch):
    tiny = FAMILIES[family]()

    def rendered(messages, **_):
        content = messages[0]["content"]
        return tiny.prompt([part for part in content if part["type"] == "image"], content[-1]["text"])

    monkeypatch.setattr(tiny.processor, "apply_chat_template", rendered, raising=False)
    asks = tuple(Ask(text, "") for text in ("one?", "and the other one?"))
    item = Item("tiny", (tiny.picture(1), tiny.picture(2)), asks)
    chosen = {name: METHODS[name](0.2) for name in ("uniform", "snapkv", "kvzip")}
    pair = (tiny.model, tiny.processor)
    for protocol in ("after", "within"):
        with torch.no_grad():
            shared = dict(Asking(*pair, chosen, protocol, max_new_tokens=12).ask(item))
        for name, ours in shared.items():
            own = alone(pair, chosen.get(name), item, protocol)
            assert (ours.first_logits - own.first_logits).abs().max() < 2e-3, (protocol, name)
            assert ours.texts == own.texts, (protocol, name)


def test_one_second_reading_serves_all_budgets(reference, item, monkeypatch):
    model, processor = reference
    few, more = ({f"kvzip {rho}": METHODS["kvzip"](rho)} for rho in (0.1, 0.5))
    read, original = [], Prefill._read_again

    def noting(self, copy):
        read.append(copy)
        original(self, copy)

    monkeypatch.setattr(Prefill, "_read_again", noting)
    found = []
    with torch.no_grad():
        for methods in (few | more, few, more):
            read.clear()
            found.append(dict(Asking(model, processor, methods, max_new_tokens=12).ask(item)))
            assert len(read) == 1
    for alone in found[1:]:
        for name in set(alone) - {FULL}:
            assert alone[name].texts == found[0][name].texts
            assert alone[name].nbytes == found[0][name].nbytes
            assert torch.equal(alone[name].first_logits, found[0][name].first_logits)
