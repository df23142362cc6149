"""Names of methods on a command line."""

from __future__ import annotations

import pytest

import capsight
from capsight.cli.evaluate import calibration_prompts
from capsight.cli.methods import METHOD_NAMES, make_methods
from capsight.errors import OptionError
from capsight.kvcapsule import KVCapsule


def made(*names):
    return make_methods(list(names), [0.5, 0.25], lambda: KVCapsule.from_pretrained("reference"), list, None)


def test_capsules_in_few_bits():
    names = ["heads", "adaptive", "heads-int8", "adaptive-int8", "heads-int4", "adaptive-int4", "evict"]
    methods = made(*names)
    assert list(methods)[4:6] == ["heads-int8 0.5", "heads-int8 0.25"]
    assert [m.info.bits for m in methods.values()][::2] == [None, None, 8, 8, 4, 4, None]
    assert [m.retained for m in methods.values()] == [0.5, 0.25] * len(names)
    assert [m.name for m in methods.values()][::2] == names


def test_names_are_unique_and_others_are_refused():
    assert len(set(METHOD_NAMES)) == len(METHOD_NAMES)
    for name in ("int8", "adaptive-int2", "static-int8", "evict-int8"):
        with pytest.raises(OptionError, match="no method"):
            made(name)


def test_static_is_fitted_at_every_fraction():
    model, processor = capsight.load_reference_vlm()
    fitted = make_methods(
        ["static"],
        [0.5, 0.25],
        lambda: KVCapsule.from_pretrained("reference"),
        lambda: calibration_prompts(processor, "reference", None)[:2],
        model,
    )
    assert {label: (m.info.codec, m.retained) for label, m in fitted.items()} == {
        "static 0.5": ("static", 0.5),
        "static 0.25": ("static", 0.25),
    }
