"""Runs models with capsules: the context manager, the attention function, positions across turns."""

from capsight.runtime.enable import enable
from capsight.runtime.fast_model import DECODES, Decode, FastModel, check_decode

__all__ = ["DECODES", "Decode", "FastModel", "check_decode", "enable"]
