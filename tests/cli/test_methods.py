"""Names of methods on a command line."""

from __future__ import annotations

import pytest

from capsight.cli.methods import METHOD_NAMES, make_methods
from capsight.errors import OptionError
from capsight.kvcapsule import KVCapsule


def made(*names):
    return make_methods(list(names), [0.5, 0.25], lambda: KVCapsule.from_pretrained("reference"), list, None)


def test_capsules_in_few_bits():
    methods = made("adaptive", "adaptive-int8", "adaptive-int4", "evict")
    assert list(methods)[2:4] == ["adaptive-int8 0.5", "adaptive-int8 0.25"]
    assert [m.info.bits for m in methods.values()] == [None, None, 8, 8, 4, 4, None, None]
    assert [m.retained for m in methods.values()] == [0.5, 0.25] * 4
    assert [m.name for m in methods.values()][::2] == ["adaptive", "adaptive-int8", "adaptive-int4", "evict"]


def test_names_are_unique_and_others_are_refused():
    assert len(set(METHOD_NAMES)) == len(METHOD_NAMES)
    for name in ("int8", "adaptive-int2", "static-int8"):
        with pytest.raises(OptionError, match="no method"):
            made(name)
