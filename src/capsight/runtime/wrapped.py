"""Finds the transformers model inside what PEFT, `torch.compile` or accelerate have wrapped around it."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel


def inner_model(model: Any) -> Any:
    """The transformers model itself; `model` where there is none to be found."""
    if isinstance(model, PreTrainedModel) or not hasattr(model, "modules"):
        return model
    return next((module for module in model.modules() if isinstance(module, PreTrainedModel)), model)
