"""The smallest codec, model family and judge: what CONTRIBUTING tells newcomers to write, held to work."""

from __future__ import annotations

import copy

import pytest
import torch
from PIL import Image

import capsight
from capsight import KVCapsule, build_layout
from capsight.evaluation import Ask, Item, evaluate, summary
from capsight.kvcapsule import codecs
from capsight.kvcapsule.codecs import LayerCodec, Payload
from capsight.kvcapsule.codecs.base import take_tensors
from capsight.layout import families
from capsight.layout.families.base import Supply, check_length, enclosing
from capsight.layout.families.rope import MRope
from capsight.layout.row_layout import VisionBlock
from tiny import FAMILIES


class PooledCodec(LayerCodec):
    """Every block as the means of r groups of neighbouring tokens."""

    name = "pooled"

    @classmethod
    def fit(cls, moments, kept, **_):
        return cls(moments.block_size, kept)

    @classmethod
    def from_tensors(cls, tensors, shape, kept):
        take_tensors(tensors, {}, {})  # it has learnt nothing, so a file holds nothing
        return cls(shape[1], kept)

    @property
    def groups(self):
        """The group of each token: `[N]`."""
        return torch.arange(self.block_size) * self.kept // self.block_size

    def encode(self, keys, values):
        if self.kept == self.block_size:
            return Payload({"keys": keys, "values": values})
        members = torch.nn.functional.one_hot(self.groups, self.kept).T.to(keys)  # [r, N]
        mean = members / members.sum(1, keepdim=True)
        return Payload({"keys": mean @ keys, "values": mean @ values})  # [M, H, r, D]

    def decode(self, payload):
        return tuple(payload.tensors[name][:, :, self.groups] for name in ("keys", "values"))

    def payload_nbytes(self, heads, head_dim, itemsize):
        return 2 * self.kept * heads * head_dim * itemsize


@pytest.mark.parametrize("retained", [0.25, 1.0])
def test_a_codec(monkeypatch, tmp_path, retained):
    monkeypatch.setitem(codecs.CODECS, PooledCodec.name, PooledCodec)
    tiny = FAMILIES["qwen2_5_vl"]()
    inputs = tiny.inputs([([tiny.picture(0)], "hi")])
    fitted = KVCapsule.fit(
        tiny.model, tiny.processor, [inputs], retained, "pooled", block_size=16, progress=False
    )
    fitted.save_pretrained(tmp_path)
    capsule = KVCapsule.from_pretrained(tmp_path).with_retained(retained)
    options = {"do_sample": False, "max_new_tokens": 4, "min_new_tokens": 4}
    cache = capsule.cache(inputs)
    found = tiny.model.generate(**inputs, past_key_values=cache, **options)
    assert cache.nbytes < cache.nbytes_full or retained == 1
    if retained == 1:
        assert torch.equal(found, tiny.model.generate(**inputs, **options))


class ToyFamily(MRope):
    """A run of image tokens between its delimiters is an image; its grid comes from `image_grid_thw`."""

    model_types = ("toy_vl",)

    def blocks(self, rows, inputs, config):
        grids = Supply(inputs, "image_grid_thw")
        found = [self._row(row, grids, config) for row in rows]
        grids.finish()
        return found

    def _row(self, row, grids, config):
        blocks = []
        for span in row.runs(config.image_token_id):
            t, h, w = grids.take(row, span[0])
            check_length(row, span, t * h * w // 4, "image_grid_thw")
            ends = enclosing(row, span, config.vision_start_token_id, config.vision_end_token_id)
            blocks.append(VisionBlock(*span, "image", (t, h // 2, w // 2), len(blocks), ends))
        return blocks


def test_a_family(monkeypatch):
    monkeypatch.setattr(families, "_registered", lambda: {"toy_vl": ToyFamily()})
    tiny = FAMILIES["qwen2_vl"]()
    inputs = tiny.inputs([([tiny.picture(0), tiny.picture(1)], "hi"), ([tiny.picture(2)], "hello")])
    config = copy.deepcopy(tiny.config)
    config.model_type = "toy_vl"
    found = build_layout(inputs, config)
    monkeypatch.undo()
    assert found == build_layout(inputs, tiny.config)


def colour_items(count):
    """Pictures of one colour, and the question which."""
    for index in range(count):
        name = ("red", "green", "blue")[index % 3]
        ask = Ask("What colour is this?", name, task="colour")
        yield Item(f"colour/{index}", (Image.new("RGB", (224, 224), name),), (ask,))


def test_a_judge():
    model, processor = capsight.load_reference_vlm()
    methods = {"heads 0.4": KVCapsule.from_pretrained("reference-heads")}
    found = summary(evaluate(model, processor, colour_items(3), methods, max_new_tokens=4))
    assert found["heads 0.4"]["by"]["task"]["colour"]["questions"] == 3
    assert found["heads 0.4"]["kv_bytes"] < found["full"]["kv_bytes"]
