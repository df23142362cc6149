"""Cheap hashes that tell one model, capsule or set of images from another."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from capsight.text_layers import config_value

_TENSORS, _NUMBERS = 24, 256
_PIXELS = 1 << 16
_CONFIG_KEYS = (
    "model_type",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
)


def model_fingerprint(model: Any) -> str:
    """Hash of the text config's essentials and of numbers sampled from weights all over the model.

    Fine-tunes of one architecture differ in it. The numbers are rounded to bfloat16 first, so that a
    model loaded in float32 and in bfloat16 has one fingerprint.

    Args:
        model: a transformers model.

    Returns:
        64 hex digits.
    """
    essentials = {key: config_value(model.config, key) for key in _CONFIG_KEYS}
    digest = hashlib.sha256(json.dumps(essentials, sort_keys=True).encode())
    weights = sorted((name, p) for name, p in _own_parameters(model) if p.ndim > 1 and p.is_floating_point())
    projections = [item for item in weights if ".k_proj." in item[0] or ".v_proj." in item[0]]
    for name, weight in [*_spread(weights), *_spread(projections)]:
        step = max(weight.numel() // _NUMBERS, 1)
        digest.update(f"{name} {tuple(weight.shape)}".encode())
        digest.update(_bytes(weight.detach().flatten()[::step][:_NUMBERS].to("cpu", torch.bfloat16)))
    return digest.hexdigest()


def _own_parameters(model: Any) -> Iterator[tuple[str, Tensor]]:
    """A transformers model's parameters under its own names, whatever is wrapped around it or them.

    `torch.compile` and PEFT put the model into another, PEFT puts adapters beside its layers, and accelerate
    leaves weights that it has offloaded on the meta device, their values with a hook of the module.
    """
    inner = next((x for x in model.modules() if isinstance(x, PreTrainedModel)), model)
    seen: set[int] = set()  # tied weights count once
    tied = set(getattr(inner, "all_tied_weights_keys", None) or ())
    for prefix, module in inner.named_modules():
        for local, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            name = f"{prefix}.{local}".replace(".base_layer.", ".")
            if ".lora_" in name or name in tied:  # offloaded, the same weight is several tensors
                continue
            held = getattr(getattr(module, "_hf_hook", None), "weights_map", None)
            yield name, held[local] if parameter.is_meta and held is not None else parameter


def tensors_fingerprint(tensors: Mapping[str, Tensor], about: Any) -> str:
    """Hash of whole tensors, their names, dtypes and shapes, and of JSON-ready values about them."""
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu()
        digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def pixels_fingerprint(pixels: Sequence[Tensor]) -> str:
    """Hash of numbers sampled from pixel tensors; "" if there are none.

    The numbers are rounded to bfloat16 first, so that casting inputs to that dtype changes nothing.
    """
    digest = hashlib.sha256()
    for tensor in pixels:
        step = max(tensor.numel() // _PIXELS, 1)
        digest.update(f"{tuple(tensor.shape)}".encode())
        digest.update(_bytes(tensor.detach().flatten()[::step].to("cpu", torch.bfloat16)))
    return digest.hexdigest() if pixels else ""


def _bytes(tensor: Tensor) -> memoryview:
    """The memory of a tensor on the CPU."""
    return tensor.contiguous().flatten().view(torch.uint8).numpy().data


def _spread(items: list[Any]) -> list[Any]:
    """At most `_TENSORS` of `items`, evenly spread."""
    return items[:: max(len(items) // _TENSORS, 1)][:_TENSORS]
