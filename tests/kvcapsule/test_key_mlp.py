"""The `static-mlp` codec: its MLP starts at zero, is trained on calibration keys, and travels in the file."""

from __future__ import annotations

import pytest
import torch

from capsight.errors import CalibrationError, CapsightError, OptionError
from capsight.kvcapsule import KVCapsule
from capsight.kvcapsule.calibration.key_mlp import train_mlp
from capsight.kvcapsule.calibration.key_samples import KeySamples, query_moment, spread
from capsight.kvcapsule.calibration.queries import recorded_queries
from capsight.kvcapsule.codecs import StaticCodec, StaticMlpCodec
from capsight.kvcapsule.codecs.token_mlp import TokenMlp
from kvcapsule.conftest import BLOCK, blocks, codec, fitted, moments


def bent(count: int, seed: int) -> torch.Tensor:
    """Keys [M, 2, 8, 4] whose tokens 4..7 are no linear function of tokens 0..3."""
    first = torch.randn(count, 2, 4, 4, generator=torch.Generator().manual_seed(seed))
    return torch.cat([first, first.abs()], 2)


def samples(keys: torch.Tensor) -> KeySamples:
    return KeySamples(keys, torch.arange(len(keys)) // 10, torch.eye(4).expand(2, 4, 4))


def test_it_starts_as_static():
    keys, values = blocks(3, 2, 8, 4, 5), blocks(3, 2, 8, 4, 6)
    found, expected = (c.decode(c.encode(keys, values)) for c in (codec("static-mlp", 3), codec("static", 3)))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_training_learns_what_no_linear_map_can():
    kept, linear = torch.arange(4), torch.eye(8, 4)
    mlp = train_mlp(kept, linear, samples(3 * bent(300, 0)), 32)
    keys = 3 * bent(50, 1)[:, 0]
    assert float((mlp(keys[:, :4]) - keys[:, 4:]).norm() / keys[:, 4:].norm()) < 0.3


def test_training_stops_at_zero_where_there_is_nothing_to_learn():
    first = torch.randn(100, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    linear = torch.cat([torch.eye(4), torch.eye(4)])
    mlp = train_mlp(torch.arange(4), linear, samples(torch.cat([first, first], 2)), 8)
    assert not mlp.w_out.any()


def test_a_trained_codec_decodes_linear_part_plus_mlp_and_keeps_kept_keys():
    static = StaticCodec.fit(moments(2, 8, 4), 3)
    mlp = TokenMlp(torch.randn(6, 3), torch.randn(6), torch.randn(5, 6))
    own = StaticMlpCodec(*static.state_dict().values(), mlp=mlp)
    keys, values = blocks(4, 2, 8, 4, 5), blocks(4, 2, 8, 4, 6)
    payload = own.encode(keys, values)
    found, expected = own.decode(payload)[0], static.decode(payload)[0].clone()
    s = own.kept_index.tolist()
    others = [i for i in range(8) if i not in s]
    assert own.others.tolist() == others
    expected[:, :, others] += mlp(keys[:, :, s])
    torch.testing.assert_close(found, expected)
    assert torch.equal(found[:, :, s], keys[:, :, s])
    with pytest.raises(CapsightError, match="materialise"):
        own.latent(payload)
    torch.testing.assert_close(mlp.scaled(2.0)(keys[0, 0, s]), 2 * mlp(keys[0, 0, s] / 2))


def test_fit_trains_and_the_file_holds_the_mlp(qwen, tmp_path):
    prompts = [qwen.inputs([([qwen.picture(seed)], "hi")]) for seed in range(90, 96)]
    capsule = KVCapsule.fit(
        qwen.model, None, iter(prompts), 0.4, "static-mlp", block_size=BLOCK, progress=False, width=8
    )
    kept = capsule.codecs[0].kept
    static = fitted(qwen, codec="static")
    extra = 4 * (8 * kept + 8 + (BLOCK - kept) * 8)
    assert capsule.module_nbytes == static.module_nbytes + len(capsule.codecs) * extra
    capsule.save_pretrained(tmp_path)
    again = KVCapsule.from_pretrained(tmp_path)
    assert again.info.options == {"width": 8}
    for index, own in capsule.codecs.items():
        assert all(torch.equal(a, b) for a, b in zip(own.mlp, again.codecs[index].mlp, strict=True))


def test_what_cannot_be_trained_is_refused(qwen):
    prompts = [qwen.inputs([([qwen.picture(90)], "hi")])]
    options = {"block_size": BLOCK, "progress": False, "codec": "static-mlp"}
    with pytest.raises(CalibrationError, match="two calibration samples"):
        KVCapsule.fit(qwen.model, None, prompts, **options)
    for width in (0, 1.5, True):
        with pytest.raises(OptionError, match="width"):
            KVCapsule.fit(qwen.model, None, prompts, width=width, **options)


def test_queries_are_recorded_and_the_model_is_left_as_it_was(qwen):
    inputs = qwen.inputs([([qwen.picture(90)], "hi")])
    text = qwen.model.config.get_text_config()
    before = text._attn_implementation
    with torch.no_grad():
        plain = qwen.model(**inputs).logits
        with recorded_queries(qwen.model) as seen:
            recorded = qwen.model(**inputs).logits
    assert text._attn_implementation == before
    torch.testing.assert_close(recorded, plain, atol=1e-4, rtol=1e-4)
    assert sorted(seen) == list(range(text.num_hidden_layers))
    assert seen[0].shape[1:3] == (text.num_attention_heads, inputs["input_ids"].shape[1])


def test_query_moments_by_hand():
    queries = torch.randn(2, 4, 5, 3)
    found = query_moment(queries, [3, 4], 2)
    q = torch.cat([queries[0, 2:4, 3:].flatten(0, 1), queries[1, 2:4, 4:].flatten(0, 1)])
    torch.testing.assert_close(found[1], q.T @ q / len(q))
    assert spread(3).tolist() == [0, 1, 2]
    assert spread(100, 3).tolist() == [0, 50, 99]
