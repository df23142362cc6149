"""A cheap hash that tells one set of model weights from another, fine-tunes of one architecture included."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch

_TENSORS, _NUMBERS = 24, 256
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

    The numbers are rounded to bfloat16 first, so that a model loaded in float32 and in bfloat16
    has one fingerprint.

    Args:
        model: a transformers model.

    Returns:
        64 hex digits.
    """
    text_config = model.config.get_text_config(decoder=True)
    essentials = {key: getattr(text_config, key, None) for key in _CONFIG_KEYS}
    digest = hashlib.sha256(json.dumps(essentials, sort_keys=True).encode())
    weights = sorted(
        (name, p) for name, p in model.named_parameters() if p.ndim > 1 and p.is_floating_point()
    )
    projections = [item for item in weights if ".k_proj." in item[0] or ".v_proj." in item[0]]
    for name, weight in [*_spread(weights), *_spread(projections)]:
        step = max(weight.numel() // _NUMBERS, 1)
        sample = weight.detach().flatten()[::step][:_NUMBERS].to("cpu", torch.bfloat16)
        digest.update(f"{name} {tuple(weight.shape)}".encode())
        digest.update(sample.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _spread(items: list[Any]) -> list[Any]:
    """At most `_TENSORS` of `items`, evenly spread."""
    return items[:: max(len(items) // _TENSORS, 1)][:_TENSORS]
