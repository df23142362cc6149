"""Decode attention in native code: one call for all rows and KV heads of a layer.

The C++ beside this file is compiled at first use and kept (`build`); without a compiler attention stays with
torch, and a warning says so.
"""

from __future__ import annotations

from capsight.kvcapsule.attention.native.build import NativeBuildError, missing
from capsight.kvcapsule.attention.native.centre import centre
from capsight.kvcapsule.attention.native.decode import append, attended, decode_attention, room_for, supports
from capsight.kvcapsule.attention.native.pack import pack
from capsight.kvcapsule.attention.native.source import Source, Sources, Steps
from capsight.kvcapsule.attention.native.step import OneToken

__all__ = [
    "NativeBuildError",
    "OneToken",
    "Source",
    "Sources",
    "Steps",
    "append",
    "attended",
    "centre",
    "decode_attention",
    "missing",
    "pack",
    "room_for",
    "supports",
]
