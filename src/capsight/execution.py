"""Where a model takes its inputs, and work that autocast must not round."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


def inputs_device(model: Any) -> torch.device:
    """The device that takes a model's inputs: its own, or where accelerate runs offloaded weights."""
    device: torch.device = model.device
    if device.type != "meta":
        return device
    hooks = (getattr(module, "_hf_hook", None) for module in model.modules())
    found = (getattr(hook, "execution_device", None) for hook in hooks)
    return torch.device(next((d for d in found if d is not None), "cpu"))


def own_precision(device: torch.device) -> AbstractContextManager[object]:
    """A context without autocast on this device: what is fitted, stored and rebuilt keeps its precision."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)
