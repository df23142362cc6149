"""A tiny local task, asked as lmms-eval and VLMEvalKit ask theirs, against the same questions asked by us."""

from __future__ import annotations

import importlib
import sys
import tomllib
from pathlib import Path

import pytest

import capsight
from capsight.errors import OptionError
from capsight.evaluation import Ask, Item, ask_item, reference_items
from capsight.integrations.answering import Answerer, until_stop
from capsight.integrations.vlmevalkit import main, options_of
from capsight.runtime import enable
from integrations import standins

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def documents():
    return [
        {"images": list(item.images), "question": ask.question, "answer": ask.answer}
        for item in reference_items("calibration", 2, 1)
        for ask in item.asks[:3]
    ]


@pytest.fixture(scope="module")
def expected(documents):
    model, processor = capsight.load_reference_vlm()
    capsule = capsight.KVCapsule.from_pretrained("reference-heads").with_retained(0.2)
    with enable(model, capsule=capsule) as fast:
        return [
            ask_item(fast, processor, Item("x", tuple(d["images"]), (Ask(d["question"], ""),)), "after", 8)
            for d in documents
        ]


@pytest.fixture
def lmms_model(monkeypatch, documents):
    standins.install(monkeypatch)
    path = importlib.import_module("capsight.integrations.lmms_eval").manifest().chat_class_path
    monkeypatch.delitem(sys.modules, path.rpartition(".")[0], raising=False)
    kind = getattr(importlib.import_module(path.rpartition(".")[0]), path.rpartition(".")[2])
    model = kind.create_from_arg_string(
        "method=adaptive,capsule=reference-heads,retained=0.2,dtype=float32",
        {"batch_size": 1, "max_batch_size": None, "device": "cpu"},
    )
    model.task_dict["tiny"] = {"test": documents}
    return model


def to_messages(document):
    images = [{"type": "image", "url": image} for image in document["images"]]
    return [{"role": "user", "content": [*images, {"type": "text", "text": document["question"]}]}]


def request(document_id, until=None, kind="generate_until"):
    options = {"max_new_tokens": 8, "temperature": 0, "until": until}
    return standins.Instance(kind, ("", to_messages, options, document_id, "tiny", "test"), 0)


def test_lmms_eval_generates(lmms_model, documents, expected):
    answers = lmms_model.generate_until([request(i) for i in range(len(documents))])
    assert answers == [e.texts[0] for e in expected]
    stop = expected[0].texts[0][-1]
    assert lmms_model.generate_until([request(0, [stop])]) == [expected[0].texts[0].split(stop)[0]]
    assert (lmms_model.is_simple, lmms_model.device.type) == (False, "cpu")


def test_lmms_eval_scores(lmms_model, documents, expected):
    def instance(said):
        arguments = (documents[0]["question"], said, lambda d: d["images"], 0, "tiny", "test")
        return standins.Instance("loglikelihood", arguments, 0)

    first = expected[0].first_logits[0]
    best = capsight.load_reference_vlm()[1].tokenizer.decode([int(first.argmax())])
    (one, greedy), (other, _) = lmms_model.loglikelihood([instance(best), instance(lambda d: "zzzz")])
    assert one == pytest.approx(first.log_softmax(-1).max().item(), abs=1e-3)
    assert greedy
    assert other < one


def test_what_lmms_eval_cannot_have(lmms_model):
    with pytest.raises(OptionError, match="one turn"):
        lmms_model.generate_until_multi_round([])
    with pytest.raises(OptionError, match="one by one"):
        type(lmms_model)(batch_size=4)
    video = [{"role": "user", "content": [{"type": "video", "url": "a.mp4"}]}]
    asked = standins.Instance("generate_until", ("", lambda d: video, {}, 0, "tiny", "test"), 0)
    with pytest.raises(OptionError, match="video"):
        lmms_model.generate_until([asked])


def test_entry_point():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    module, _, name = project["entry-points"]["lmms_eval.models"]["capsight"].partition(":")
    assert callable(getattr(importlib.import_module(module), name))


def test_vlmevalkit(monkeypatch, tmp_path, documents, expected):
    standins.install(monkeypatch)
    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.setattr(sys, "path", [*sys.path])
    parts = []
    for number, image in enumerate(documents[0]["images"]):
        image.save(tmp_path / f"{number}.png")
        parts.append({"type": "image", "value": str(tmp_path / f"{number}.png")})
    parts.append({"type": "text", "value": documents[0]["question"]})
    (tmp_path / "run.py").write_text(
        "import sys\nfrom vlmeval.config import supported_VLM\n"
        "print(sys.argv[1:], file=open(__file__ + '.out', 'w'))\n"
        "supported_VLM['made'] = supported_VLM['capsight']()\n"
    )
    main(
        [
            "method=adaptive,capsule=reference-heads,retained=0.2",
            str(tmp_path / "run.py"),
            "--model",
            "capsight",
        ]
    )
    assert (tmp_path / "run.py.out").read_text() == "['--model', 'capsight']\n"
    model = sys.modules["vlmeval.config"].supported_VLM["made"]
    assert model.INTERLEAVE
    assert model.generate(parts).startswith(expected[0].texts[0][:4])


def test_options():
    assert options_of("pretrained=a/b,retained=0.2") == {"pretrained": "a/b", "retained": 0.2}
    with pytest.raises(OptionError, match="magic"):
        options_of("magic")
    with pytest.raises(OptionError, match="no method"):
        Answerer.load(method="magic")
    with pytest.raises(OptionError, match="fitted"):
        Answerer.load(method="feature-pca")
    with pytest.raises(OptionError, match="before"):
        Answerer.load(protocol="before")


def test_stops():
    assert until_stop("a\nb", ["\n"]) == "a"
    assert until_stop("ab", "") == until_stop("ab", None) == "ab"
