"""A tiny copy of a model class: its config with few layers of few channels, and random weights."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, PreTrainedConfig

from capsight.errors import OptionError
from capsight.layout.families import family_for

_LAYERS, _HEADS, _KV_HEADS, _WIDTH = 4, 4, 2, 64
_ERRORS = (ValueError, TypeError, AttributeError, KeyError, RuntimeError, ZeroDivisionError, IndexError)


def tiny_model(config: Any, seed: int = 0) -> Any:
    """A model of the class that a config names, small enough for a laptop: float32, eval mode.

    What decides how prompts are read and how caches are laid out stays as it is: token ids, patch and
    merge sizes, head size, rotary sections, kinds of layers. Layers, heads, widths and experts are few.

    Args:
        config: of the whole vision-language model.
        seed: of the random weights.

    Raises:
        UnsupportedModelError: the family is not known.
        OptionError: transformers cannot build the small model; the config has sizes that do not go together.
    """
    family_for(config)
    try:
        small = type(config).from_dict(_small(config))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = AutoModelForImageTextToText.from_config(small, dtype=torch.float32)
            _spread(model)
    except _ERRORS as error:
        reason = str(error).strip().splitlines()[0]
        raise OptionError(f"no small {config.model_type} can be made from this config: {reason}") from error
    return model.eval()


def _small(config: PreTrainedConfig) -> dict[str, Any]:
    values = copy.deepcopy(config.to_dict())
    text = config.get_text_config(decoder=True)
    inner = next((key for key in ("text_config", "llm_config") if key in values), None)
    small = _text(values[inner] if inner else values, text)
    if inner:
        values[inner] = small
    values["vision_config"] = _vision(values["vision_config"], small["hidden_size"])
    for name in ("hidden_size", "projection_dim"):
        if inner and name in values:
            values[name] = small["hidden_size"]
    merge = getattr(config.vision_config, "merge_size", None)
    if inner and merge and "out_hidden_size" in values:  # Muse Glimmer's: channels of merged patches
        values["out_hidden_size"] = values["vision_config"]["hidden_size"] * merge**2
    for name in ("audio_config", "dtype", "torch_dtype", "quantization_config"):
        values.pop(name, None)
    return values


def _text(values: dict[str, Any], text: Any) -> dict[str, Any]:
    """Four layers, or as many as it takes to have one of each kind."""
    kinds = values.get("layer_types")
    layers = min(_LAYERS, text.num_hidden_layers)
    if kinds:
        layers = max(layers, *(kinds.index(kind) + 1 for kind in set(kinds)))
    heads = values["num_attention_heads"]
    head_dim = values.get("head_dim") or values["hidden_size"] // heads
    grouped = (values.get("num_key_value_heads") or heads) < heads
    values |= {
        "num_hidden_layers": layers,
        "num_attention_heads": _HEADS,
        "hidden_size": _HEADS * head_dim,
        "intermediate_size": 2 * _WIDTH,
    }
    known = {
        "num_key_value_heads": _KV_HEADS if grouped else _HEADS,
        "layer_types": kinds and kinds[:layers],
        "layer_rope_theta": (values.get("layer_rope_theta") or [])[:layers],
        "num_experts": 4,
        "num_local_experts": 4,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "top_k_experts": 2,
        "moe_intermediate_size": _WIDTH,
        "shared_expert_intermediate_size": _WIDTH,
        "first_k_dense_replace": 1,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "max_window_layers": layers,
        "mlp_only_layers": [],
    }
    return values | {name: value for name, value in known.items() if values.get(name)}


def _vision(values: dict[str, Any], text_width: int) -> dict[str, Any]:
    heads = values.get("num_attention_heads") or values.get("num_heads") or 1
    wide = "embed_dim" if values.get("model_type", "").startswith("qwen2_vl") else "hidden_size"
    head_dim = values.get("head_dim") or (values[wide] // heads if wide in values else _WIDTH)
    depth = 3
    known = {
        "depth": depth,
        "num_hidden_layers": depth,
        "num_heads": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "intermediate_size": 2 * _WIDTH,
        "out_hidden_size": text_width,
        "projection_dim": text_width,
        "output_proj_dims": text_width,
        "mm_embed_dim": text_width,
        "fullatt_block_indexes": [depth - 1],
        "deepstack_visual_indexes": [0, 1],
        "layer_types": ((values.get("layer_types") or []) * depth)[:depth],
        wide: 2 * head_dim,
    }
    small = values | {name: value for name, value in known.items() if values.get(name)}
    if wide == "embed_dim":
        small["hidden_size"] = text_width
    return small


def _spread(model: Any) -> None:
    """Weights large enough that answers differ."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "norm" not in name:
                scale = 0.1 if "embed_tokens" in name else parameter[0].numel() ** -0.5
                parameter.normal_(0.0, scale)
