"""A hash of the PEFT adapters that a model runs with: others would have read the same images otherwise."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter
from transformers import PreTrainedModel

from capsight.errors import ModelMismatchError

_NUMBERS = 8


def adapters_fingerprint(model: Any) -> str:
    """Hash of the adapters that take part in a model's passes now.

    Of each of their tensors some numbers count, rounded to bfloat16, and the scaling; what they are called
    does not.

    Args:
        model: a transformers model, in PEFT's wrapper or not.

    Returns:
        32 hex digits; "" where no adapter takes part.
    """
    if not any(getattr(module, "peft_config", None) for module in _outermost(model)):
        return ""
    about, numbers = [], []
    for module in model.modules():
        for part, weight in _active(module):
            flat = weight.detach().flatten()
            about.append(f"{part} {tuple(weight.shape)}")
            if not weight.is_meta:  # offloaded
                numbers.append(flat[:: max(len(flat) // _NUMBERS, 1)][:_NUMBERS].bfloat16().cpu())
    if not about:
        return ""
    digest = hashlib.sha256("\n".join(about).encode())
    for some in numbers:
        digest.update(some.contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]


def check_adapters(read_with: str, model: Any, what: str) -> None:
    """Refuse what a model has read with other adapters than it runs with now.

    Args:
        read_with: the fingerprint of those.
        model: the model.
        what: was read, for the message.

    Raises:
        ModelMismatchError: they are others.
    """
    if read_with != adapters_fingerprint(model):
        raise ModelMismatchError(
            f"{what} was read with other adapters (PEFT) than are active now; activate those, or read the "
            "images anew"
        )


def _outermost(model: Any) -> Iterator[Module]:
    """A transformers model and what is wrapped around it."""
    for module in model.modules():
        yield module
        if isinstance(module, PreTrainedModel):
            return


def _active(module: Module) -> Iterator[tuple[str, Tensor]]:
    """What one of PEFT's modules adds to a pass: a description and tensors of its active adapters."""
    held = getattr(module, "modules_to_save", None)
    names = (*getattr(module, "adapter_layer_names", ()), *(("modules_to_save",) if held else ()))
    if not names or getattr(module, "disable_adapters", False) is True:
        return
    scaling = getattr(module, "scaling", {})
    for adapter in getattr(module, "active_adapters", ()):
        for name in names:
            parts: Any = getattr(module, name, None)
            if not hasattr(parts, "keys") or adapter not in parts.keys():  # noqa: SIM118
                continue
            part, factor = parts[adapter], scaling.get(adapter, 1) if isinstance(scaling, dict) else 1
            tensors = part.parameters() if isinstance(part, Module) else [part]
            yield from ((f"{name} {factor}", x) for x in tensors if isinstance(x, Tensor | Parameter))
