"""The facade: fit, save, load, refuse."""

from __future__ import annotations

import copy

import pytest
import torch
from PIL import Image
from transformers import DynamicCache

from capsight.baselines import METHODS
from capsight.errors import (
    CalibrationError,
    CapsightError,
    ModelMismatchError,
    OptionError,
)
from capsight.kvcapsule import KVCapsule
from capsight.kvcapsule.calibration.fit import Calibration, add_sample, calibrate
from capsight.model_fingerprint import model_fingerprint
from kvcapsule.conftest import BLOCK, fitted


@pytest.fixture
def capsule(qwen):
    return fitted(qwen)


@pytest.mark.parametrize("codec", ["adaptive", "static", "evict", "heads"])
def test_save_and_load(qwen, tmp_path, codec):
    inputs = qwen.inputs([([qwen.picture(0)], "hi")])
    capsule = fitted(qwen, codec=codec, ridge=0.02)
    capsule.save_pretrained(tmp_path)
    again = KVCapsule.from_pretrained(tmp_path)
    assert again.info == capsule.info
    assert (again.retained, again.module_nbytes) == (capsule.retained, capsule.module_nbytes)
    again.check_model(qwen.model)
    for index, layer in capsule.codecs.items():
        for name, tensor in layer.state_dict().items():
            assert torch.equal(tensor, again.codecs[index].state_dict()[name])
    cache = again.cache(inputs)
    with torch.no_grad():
        qwen.model(**inputs, past_key_values=cache, use_cache=True)
    assert cache.nbytes < cache.nbytes_full
    assert cache.module_nbytes == capsule.module_nbytes


def test_config_travels_with_every_family(vlm, tmp_path):
    fitted(vlm).save_pretrained(tmp_path)
    inputs = vlm.inputs([([vlm.picture(0)], "hi")])
    assert (
        len(KVCapsule.from_pretrained(tmp_path).cache(inputs).layers)
        == vlm.config.get_text_config().num_hidden_layers
    )


def test_another_model_is_refused(qwen, capsule):
    capsule.check_model(qwen.model)
    assert model_fingerprint(copy.deepcopy(qwen.model).to(torch.bfloat16)) != ""
    other = copy.deepcopy(qwen.model)
    with torch.no_grad():
        for name, weight in other.named_parameters():
            if "v_proj" in name:
                weight += 0.01
    with pytest.raises(ModelMismatchError, match="another"):
        capsule.check_model(other)
    config = copy.deepcopy(qwen.config)
    config.text_config.num_hidden_layers = 2
    config.text_config.layer_types = ["full_attention"] * 2
    with pytest.raises(ModelMismatchError, match="layers"):
        capsule.cache(qwen.inputs([([], "x")]), config)


def test_fit_is_one_pass_over_any_batching_and_leaves_the_model_alone(qwen):
    pairs = [([qwen.picture(seed)], "x") for seed in range(3)]
    one = calibrate(qwen.model, None, [qwen.inputs([pair]) for pair in pairs], BLOCK, False).moments
    together = calibrate(qwen.model, None, iter([qwen.inputs(pairs)]), BLOCK, False).moments
    for index in one:
        torch.testing.assert_close(one[index].keys.second, together[index].keys.second, rtol=1e-4, atol=1e-4)
        assert one[index].blocks == 3 * 64 // BLOCK
    qwen.model.train()
    before = qwen.config.text_config._attn_implementation
    calibrate(qwen.model, None, [qwen.inputs(pairs)], BLOCK, True)
    assert qwen.model.training
    assert qwen.config.text_config._attn_implementation == before
    qwen.model.eval()


def test_moments_of_a_sample_are_those_of_its_blocks(qwen):
    inputs = qwen.inputs([([qwen.picture(0)], "x")])
    found = Calibration()
    add_sample(found, qwen.model, inputs, BLOCK)
    cache = DynamicCache(config=qwen.config)
    with torch.no_grad():
        qwen.model(**inputs, past_key_values=cache, use_cache=True)
    start = int((inputs["input_ids"][0] == qwen.config.image_token_id).nonzero()[0])
    expected = torch.zeros(BLOCK, BLOCK, dtype=torch.float64)
    for run in range(start, start + 64, BLOCK):
        x = cache.layers[1].keys[0, 1, run : run + BLOCK].double()
        expected += x @ x.T
    torch.testing.assert_close(found.moments[1].keys.second[1], expected)


def test_calibration_without_a_block_or_with_nan_is_refused(qwen):
    fit = KVCapsule.fit
    image = qwen.inputs([([qwen.picture(0)], "x")])
    for samples, size in (([], BLOCK), ([qwen.inputs([([], "text")])], BLOCK), ([image], 65)):
        with pytest.raises(CalibrationError, match="no calibration sample"):
            fit(qwen.model, None, samples, codec="heads", block_size=size, progress=False)
    broken = copy.deepcopy(qwen.model)
    with torch.no_grad():
        broken.model.language_model.layers[1].self_attn.v_proj.weight[0, 0] = float("nan")
    with pytest.raises(CalibrationError, match=r"layer 1: .*NaN"):
        fit(broken, None, [image], codec="heads", block_size=BLOCK, progress=False)
    with pytest.raises(CalibrationError, match="NaN"):
        fit(broken, None, [image], progress=False)
    with pytest.raises(CalibrationError, match="processor"):
        fit(qwen.model, None, [[{"role": "user", "content": "x"}]], progress=False)


def test_chat_messages_are_rendered_by_the_processor(qwen, monkeypatch):
    rendered = qwen.inputs([([qwen.picture(0)], "x")])
    monkeypatch.setattr(qwen.processor, "apply_chat_template", lambda *_, **__: rendered, raising=False)
    messages = [{"role": "user", "content": [{"type": "image", "image": Image.new("RGB", (64, 64))}]}]
    found = calibrate(qwen.model, qwen.processor, [messages], BLOCK, False)
    assert found.moments[0].blocks == 64 // BLOCK


def test_progress_goes_to_stderr(qwen, capfd):
    KVCapsule.fit(qwen.model, None, [qwen.inputs([([qwen.picture(0)], "x")])] * 2)
    said = capfd.readouterr()
    assert said.out == ""
    assert all(word in said.err for word in ("calibrating", "2/2"))


def test_options_are_checked_before_calibration(qwen):
    for options in ({"retained": 0.0}, {"retained": 1.1}, {"retained": float("nan")}):
        with pytest.raises(OptionError, match="retained"):
            KVCapsule.fit(qwen.model, None, [], **options)
    with pytest.raises(OptionError, match="codec"):
        KVCapsule.fit(qwen.model, None, [], codec="zip")
    with pytest.raises(OptionError, match="budget"):
        KVCapsule.fit(qwen.model, None, [], budget="magic")
    with pytest.raises(OptionError, match="budget"):
        KVCapsule.fit(qwen.model, None, [], codec="static", budget="water-filled")
    with pytest.raises(OptionError, match="magic"):
        KVCapsule.fit(qwen.model, None, [], magic=1)
    with pytest.raises(OptionError, match="joint"):
        KVCapsule.fit(qwen.model, None, [], codec="static", joint=True)
    with pytest.raises(OptionError, match="ridge"):
        KVCapsule.fit(qwen.model, None, [], codec="heads", ridge=7)
    with pytest.raises(CapsightError):
        KVCapsule.fit(
            qwen.model,
            None,
            [qwen.inputs([([qwen.picture(0)], "x")])],
            codec="heads",
            block_size=1,
            progress=False,
        )


def test_with_retained_equals_a_fit_and_with_codec_is_the_control(qwen, capsule):
    for a, b in (
        (capsule.with_retained(0.75), fitted(qwen, 0.75)),
        (capsule.with_codec("evict"), fitted(qwen, codec="evict")),
        (capsule.with_codec("heads"), fitted(qwen, codec="heads")),
        (capsule.with_codec("heads").with_retained(0.75), fitted(qwen, 0.75, codec="heads")),
    ):
        assert a.info == b.info
        assert a.retained == b.retained
        for index in a.codecs:
            assert type(a.codecs[index]) is type(b.codecs[index])
            assert torch.equal(a.codecs[index].packed, b.codecs[index].packed)
    for other in ("evict", "heads"):
        assert capsule.with_codec(other).with_codec("adaptive").info == capsule.info
    with pytest.raises(OptionError, match="share"):
        capsule.with_codec("static")
    with pytest.raises(OptionError, match="fit again"):
        fitted(qwen, codec="static").with_retained(0.5)


@pytest.mark.parametrize("codec", ["adaptive", "static", "heads"])
@pytest.mark.parametrize("batch", [1, 3])
def test_break_even_by_counting_up(qwen, codec, batch):
    capsule = fitted(qwen, 0.4, codec=codec)
    tokens = 0
    while True:
        tokens += BLOCK
        runs = tokens // BLOCK * batch
        full = runs * BLOCK * 3 * 2 * 2 * 16 * 4  # 3 layers, K and V, 2 heads of 16, float32
        positions = {"adaptive": 6, "heads": 2 * (6 + 1)}.get(codec, 0)  # of each head, and their number
        small = runs * (3 * (6 * 2 * 2 * 16 * 4 + positions) + 16)
        if small + capsule.module_nbytes < full:
            break
    assert capsule.break_even_tokens(batch) == tokens
    assert capsule.break_even_tokens() >= capsule.break_even_tokens(100)
    assert fitted(qwen, 1.0).break_even_tokens() is None


def test_joint_is_the_default_and_heads_rebuilds_nothing(qwen):
    samples = [qwen.inputs([([qwen.picture(0)], "hi")])]
    assert KVCapsule.fit(qwen.model, None, samples, progress=False, retained=0.5).info.codec == "joint"
    capsule = KVCapsule.fit(qwen.model, None, samples, codec="heads", block_size=BLOCK, progress=False)
    assert (capsule.info.codec, capsule.name, capsule.with_bits(4).name) == ("heads", "heads", "heads-int4")
    for codec, rebuilds in (("heads", False), ("evict", False), ("adaptive", True)):
        other = capsule.with_codec(codec)
        assert (other.rebuilds, other.needs_attention) == (rebuilds, not rebuilds)
    with pytest.raises(OptionError, match="no prediction weights"):
        capsule.with_weights("stored")
    assert capsule.for_latent() is capsule
    assert capsule.with_codec("adaptive").for_latent().codecs[0].weights == "stored"


def test_where_the_model_was_loaded_from_is_not_stored(qwen):
    assert "_name_or_path" not in str(fitted(qwen, 0.4).info.model_config)


def test_a_compression_ratio_is_one_minus_retained(qwen):
    named = fitted(qwen, retained=None, compression_ratio=0.6)
    assert named.info == fitted(qwen, 0.4).info
    assert named.with_retained(compression_ratio=0.75).info == named.with_retained(0.25).info
    for wrong in ({"retained": "0.4"}, {"retained": True}, {"compression_ratio": "0.6"}):
        for refused in (named.with_retained, lambda w=wrong, **_: fitted(qwen, **({"retained": None} | w))):
            with pytest.raises(OptionError, match="is a fraction"):
                refused(**wrong)
    with pytest.raises(OptionError, match="fraction in"):
        METHODS["snapkv"]("0.4")
    for wrong in ({"retained": 0.4, "compression_ratio": 0.6}, {"compression_ratio": 1.0}, {}):
        with pytest.raises(OptionError, match="compression_ratio"):
            named.with_retained(**wrong)
    with pytest.raises(OptionError, match="not both"):
        fitted(qwen, 0.4, compression_ratio=0.6)
