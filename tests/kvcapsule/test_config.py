"""`CapsuleConfig`: one value says what a capsule is to be like, and is checked when it is made."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from capsight import CapsuleConfig, KVCapsule
from capsight.errors import OptionError


def samples(vlm):
    return [vlm.inputs([([vlm.picture(seed), vlm.picture(seed + 1)], "what")]) for seed in (0, 2)]


def assert_alike(a: KVCapsule, b: KVCapsule) -> None:
    assert a.info == b.info
    for index in a.codecs:
        own, other = a.codecs[index].state_dict(), b.codecs[index].state_dict()
        assert own.keys() == other.keys()
        assert all(torch.equal(own[name], other[name]) for name in own)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"codec": "zip"}, "codec must be one of"),
        ({"codec": ["heads"]}, "codec"),
        ({"retained": 0}, "retained"),
        ({"retained": "0.4"}, "retained"),
        ({"retained": float("nan")}, "retained"),
        ({"codec": "heads", "block_size": 1}, "block_size"),
        ({"codec": "heads", "block_size": 16.0}, "block_size"),
        ({"codec": "heads", "budget": "magic"}, "budget"),
        ({"codec": "static", "budget": "water-filled"}, "budget"),
        ({"budget": "water-filled"}, "budget"),
        ({"codec": "heads", "bits": 3}, "bits"),
        ({"bits": 8}, "bits"),
        ({"options": {"ridge": 1e-3}}, "ridge"),
        ({"options": {"rank": 0}}, "rank"),
        ({"codec": "heads", "options": {"magic": 1}}, "magic"),
        ({"codec": "heads", "options": {"ridge": 7}}, "ridge"),
        ({"codec": "adaptive", "options": {"weights": "lost"}}, "weights"),
    ],
)
def test_what_is_wrong_is_refused_when_it_is_made(config, words):
    with pytest.raises(OptionError, match=words):
        CapsuleConfig(**config)


def test_defaults_are_those_of_the_codec():
    config = CapsuleConfig()
    assert (config.codec, config.share, config.sharing) == ("joint", 0.05, "uniform")
    assert replace(config, codec="heads").share == 0.40
    assert replace(config, codec="heads", retained=0.2).share == 0.2


def test_a_config_and_the_same_by_name_fit_the_same(qwen):
    config = CapsuleConfig(codec="heads", retained=0.25, block_size=16, bits=8, options={"ridge": 1e-3})
    by_config = KVCapsule.fit(qwen.model, None, samples(qwen), config, progress=False)
    named = {"codec": "heads", "block_size": 16, "bits": 8, "ridge": 1e-3, "progress": False}
    for retained in ({"retained": 0.25}, {"compression_ratio": 0.75}):
        assert_alike(by_config, KVCapsule.fit(qwen.model, None, samples(qwen), **retained, **named))
    assert_alike(by_config, KVCapsule.fit(qwen.model, None, samples(qwen), 0.25, **named))
    wide = KVCapsule.fit(qwen.model, None, samples(qwen), config, retained=0.5, progress=False)
    assert (wide.retained, wide.info.bits) == (0.5, 8)
    assert by_config.capsule_config == replace(config, budget="uniform")


@pytest.mark.parametrize("given", [{"retained": 0.2}, {"compression_ratio": 0.8}])
def test_a_fraction_is_given_once(qwen, given):
    with pytest.raises(OptionError, match="retained"):
        KVCapsule.fit(qwen.model, None, samples(qwen), 0.2, progress=False, **given)


def test_a_fitted_capsule_takes_another_config(qwen):
    heads = KVCapsule.fit(qwen.model, None, samples(qwen), 0.5, "heads", 16, progress=False)
    own = heads.capsule_config
    assert_alike(heads.with_config(own), heads)
    wanted = replace(own, codec="adaptive", retained=0.25, budget="water-filled", bits=4)
    wanted = replace(wanted, options={"weights": "stored"})
    by_steps = heads.with_codec("adaptive").with_budget("water-filled").with_retained(0.25)
    found = heads.with_config(wanted)
    assert_alike(found, by_steps.with_weights("stored").with_bits(4))
    assert found.capsule_config == wanted
    for other in ({"block_size": 8}, {"options": {"ridge": 1e-3}}, {"codec": "joint"}):
        with pytest.raises(OptionError):
            heads.with_config(replace(own, **other))


def test_a_joint_capsule_takes_another_config(qwen):
    joint = KVCapsule.fit(qwen.model, None, samples(qwen), progress=False)
    own = joint.capsule_config
    assert own == CapsuleConfig(retained=0.05, budget="uniform")
    assert_alike(joint.with_config(replace(own, retained=0.5)), joint.with_retained(0.5))
    with pytest.raises(OptionError, match="fit"):
        joint.with_config(replace(own, options={"rank": 3}))
