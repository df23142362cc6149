"""Runs models with capsules: the context manager, the attention function, positions across turns."""

from capsight.runtime.compiled import compiled_steps
from capsight.runtime.decode import DECODES, Decode, check_decode
from capsight.runtime.enable import enable
from capsight.runtime.fast_model import FastModel

__all__ = ["DECODES", "Decode", "FastModel", "check_decode", "compiled_steps", "enable"]
