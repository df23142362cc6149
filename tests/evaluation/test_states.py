"""Models with states beside keys and values: questions of several lengths, and bytes counted apart."""

from __future__ import annotations

from contextlib import nullcontext
from io import StringIO
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from transformers.cache_utils import LinearAttentionLayer

import capsight
from capsight.cli.bench import _print, _with_ratios
from capsight.cli.evaluate_tables import print_report
from capsight.errors import LayoutError
from capsight.evaluation import Ask, Item, ask_item, evaluate, summary
from capsight.evaluation.bench import bench, variants
from capsight.evaluation.cache_bytes import CacheBytes
from capsight.integrations.answering import Answerer
from capsight.report import EvalFile, Material, build_report, read
from capsight.runtime.turn import _check_padding
from processors.checkpoints import template
from report import samples
from tiny import FAMILIES, TinyVLM

ASKS = (Ask("what?", ""), Ask("which one has more of it?", ""), Ask("how?", ""))


@pytest.fixture(params=["qwen3_5", "lfm2_vl"])
def vlm(request, monkeypatch) -> TinyVLM:
    found = FAMILIES[request.param]()
    monkeypatch.setattr(found.processor, "chat_template", template(found), raising=False)
    return found


@pytest.fixture
def item(vlm) -> Item:
    return Item("tiny", (vlm.picture(1), vlm.picture(2, vlm.other_size)), ASKS)


def capsule(vlm, retained):
    samples_of = [vlm.inputs([([vlm.picture(9)], "hi")])]
    return capsight.KVCapsule.fit(vlm.model, None, samples_of, retained, progress=False)


def test_questions_of_several_lengths_over_one_cache(vlm, item):
    """Padding before the shorter ones would run through the states."""
    for used in (None, capsule(vlm, 1.0)):
        with capsight.enable(vlm.model, capsule=used) as fast, torch.no_grad():
            after, within = (ask_item(fast, vlm.processor, item, p, 4) for p in ("after", "within"))
        assert (after.first_logits - within.first_logits).abs().max() < 1e-3
        assert after.texts == within.texts
        assert after.nbytes.states > 0


def test_figures_count_states_apart(vlm, item, tmp_path):
    used = {"joint 0.4": capsule(vlm, 0.4)}
    figures = summary(evaluate(vlm.model, vlm.processor, [item], used, max_new_tokens=4))
    with capsight.enable(vlm.model) as fast, torch.no_grad():
        cache = fast.encapsulate(**vlm.inputs([(item.images, "")]))
    kv, _, states = CacheBytes.of(cache)
    text = vlm.config.get_text_config()
    full = sum(kind == "full_attention" for kind in text.layer_types)
    channels = text.num_key_value_heads * (text.hidden_size // text.num_attention_heads)
    assert kv == 4 * 2 * full * channels * cache.get_seq_length()
    assert figures["full"]["kv_bytes"] == figures["joint 0.4"]["kv_bytes_full"] == kv
    assert figures["full"]["state_bytes"] == figures["joint 0.4"]["state_bytes"] == states > 0
    assert figures["joint 0.4"]["kv_bytes"] < kv
    out = StringIO()
    print_report(Console(file=out, width=200), figures, "tiny")
    assert "states" in out.getvalue()


def test_bench_counts_states_apart():
    vlm = FAMILIES["qwen3_5"]()
    vlm.processor.chat_template = template(vlm)
    rows = list(
        bench(vlm.model, vlm.processor, variants({"joint 0.4": capsule(vlm, 0.4)}, []), [2], [1], 2, 1)
    )
    full, ours = rows
    assert full.state_bytes == ours.state_bytes > 0
    assert ours.kv_bytes < full.kv_bytes
    held = full.kv_bytes + full.state_bytes
    assert full.largest_batch(held) == 2
    assert ours.ratios(full, full)["bytes"] == round(
        (ours.kv_bytes + ours.module_bytes + ours.state_bytes) / held, 4
    )
    out = StringIO()
    _print(Console(file=out, width=200), _with_ratios(rows, None), [], None)
    assert "states" in out.getvalue()


def test_harnesses_get_the_same_answers(vlm, item):
    used = capsule(vlm, 0.4)
    one = Item("one", item.images, ASKS[:1])
    content = [*[{"type": "image"}] * len(one.images), {"type": "text", "text": ASKS[0].question}]
    messages = [{"role": "user", "content": content}]
    answerer = Answerer(vlm.model, vlm.processor, used)
    with capsight.enable(vlm.model, capsule=used) as fast, torch.no_grad():
        assert (answerer.answer(messages, one.images, 4),) == ask_item(
            fast, vlm.processor, one, max_new_tokens=4
        ).texts
    assert answerer.score(messages, one.images, "x")[0] < 0


def test_the_report_has_a_column_of_states_where_there_are_some(tmp_path):
    values = samples.eval_json()
    page = build_report(Material((read(EvalFile, samples.write(tmp_path, "a", values)),)))
    assert "<th>states</th>" not in page
    for row in values["methods"].values():
        row["state_bytes"] = 7_700_000
    page = build_report(Material((read(EvalFile, samples.write(tmp_path, "b", values)),)))
    assert "<th>states</th>" in page
    assert "<td>7.7 MB</td>" in page


def test_a_padded_turn_is_refused(vlm):
    first = vlm.inputs([([vlm.picture(0)], "hi"), ([vlm.picture(1)], "hi")])
    with capsight.enable(vlm.model) as fast:
        cache = fast.encapsulate(**first)
        ids = torch.cat([first["input_ids"], first["input_ids"][:, -3:]], 1)
        mask = torch.ones_like(ids)
        fast.generate(past_key_values=cache, input_ids=ids, attention_mask=mask, max_new_tokens=1)
        mask = torch.ones(2, cache.get_seq_length() + 3, dtype=torch.int64)
        ids = torch.nn.functional.pad(ids, (0, mask.shape[1] - ids.shape[1]), value=1)
        mask[1, -3] = 0
        with pytest.raises(LayoutError, match="rows of one length together"):
            fast.generate(past_key_values=cache, input_ids=ids, attention_mask=mask, max_new_tokens=1)


def test_padding_before_a_row_begins_is_no_matter():
    cache = SimpleNamespace(layers=[LinearAttentionLayer()])
    for mask, fine in (
        [[0, 0, 0, 1], True],
        [[1, 1, 1, 1], True],
        [[0, 1, 0, 1], False],
        [[1, 1, 1, 0], False],
    ):
        with nullcontext() if fine else pytest.raises(LayoutError):
            _check_padding(cache, {"attention_mask": torch.tensor([mask])}, 2)
