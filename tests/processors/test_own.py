"""A processor of one's own: any object with the three parts, from Python and by name."""

from __future__ import annotations

import sys

import pytest
import torch

import capsight
from capsight.cli.models import load_model
from capsight.errors import OptionError
from capsight.evaluation import ask_item, reference_items
from capsight.processors import Processor, own_processor
from capsight.runtime import enable

MODULE = """
import capsight.reference

class Mine:
    '''Nothing but what the protocol asks for.'''
    __slots__ = ("_inner", "tokenizer")

    def __init__(self, inner):
        self._inner, self.tokenizer = inner, Tokenizer(inner.tokenizer)

    def apply_chat_template(self, messages, **options):
        assert options == {"add_generation_prompt": True, "tokenize": False}
        return self._inner.apply_chat_template(messages, **options)

    def __call__(self, text, images=None, **options):
        assert options == {"return_tensors": "pt", "padding": True}
        return dict(self._inner(text=text, images=images, **options))

class Tokenizer:
    __slots__ = ("_inner", "padding_side", "pad_token_id")

    def __init__(self, inner):
        self._inner, self.pad_token_id = inner, inner.pad_token_id

    def __call__(self, text, add_special_tokens):
        return {"input_ids": self._inner(text, add_special_tokens=add_special_tokens)["input_ids"]}

    def batch_decode(self, ids, skip_special_tokens):
        return self._inner.batch_decode(ids, skip_special_tokens=skip_special_tokens)

class Group:
    @staticmethod
    def nested():
        return make("reference")

def make(name):
    assert name == "reference"
    return Mine(capsight.reference.load_reference_processor())

def nothing():
    return object()

def fails(name):
    raise RuntimeError("no such luck\\nat all")

def leaves():
    raise SystemExit(3)

value = 3
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "capsight_test_mine.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    yield "capsight_test_mine"
    sys.modules.pop("capsight_test_mine", None)


@pytest.mark.parametrize("protocol", ["after", "within"])
def test_it_answers_as_the_real_one(module, protocol):
    item = next(iter(reference_items("calibration", 2, 1)))
    capsule = capsight.KVCapsule.from_pretrained("reference")
    said = []
    for name in (None, f"{module}:make", f"{module}:Group.nested"):
        model, processor = load_model("reference", processor=name)
        with enable(model, capsule=capsule) as fast, torch.no_grad():
            said.append(ask_item(fast, processor, item, protocol).texts)
    assert said[0] == said[1] == said[2]
    assert isinstance(processor, Processor)
    assert processor.tokenizer.padding_side == "left"


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("make", "module:factory"), (":make", "module:factory"), ("capsight_test_mine:", "module:factory"),
        ("no_such_module_here:make", "no_such_module_here"), ("capsight_test_mine:none", "none"),
        ("capsight_test_mine:value", "callable"), ("capsight_test_mine:fails", "no such luck at all"),
        ("capsight_test_mine:leaves", "SystemExit: 3"),
        ("capsight_test_mine:nothing", "without apply_chat_template, __call__, tokenizer"),
        ("capsight_test_mine:make", "AssertionError"),
    ],
)  # fmt: skip
def test_what_is_none(module, source, words):
    before = list(sys.path)
    with pytest.raises(OptionError) as caught:
        own_processor(source, "another model")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert sys.path == before
