"""Runs models with capsules: the context manager, the attention function, positions across turns."""

from capsight.runtime.enable import FastModel, enable

__all__ = ["FastModel", "enable"]
