"""Sizes of each layer of a language model, which in mixed models (Gemma 4) differ from layer to layer."""

from __future__ import annotations

from typing import Any, NamedTuple


class LayerSizes(NamedTuple):
    """Attention sizes of one layer.

    Attributes:
        query_heads: Hq.
        kv_heads: Hkv.
        head_dim: channels per head (D).
    """

    query_heads: int
    kv_heads: int
    head_dim: int


def layer_sizes(config: Any) -> list[LayerSizes]:
    """The sizes of every layer, whether or not it has attention.

    Args:
        config: of a language model, or of a whole vision-language model.
    """
    text = config.get_text_config(decoder=True)
    return [_sizes(layer) for layer in _layers(text)]


def config_value(config: Any, key: str) -> Any:
    """What a language model's config says under a key, a value per layer where they differ; or None.

    Args:
        config: of a language model, or of a whole vision-language model.
        key: a field's name.
    """
    text = config.get_text_config(decoder=True)
    try:
        return getattr(text, key, None)
    except RuntimeError:  # transformers' answer where layers differ
        return [getattr(layer, key, None) for layer in _layers(text)]


def _layers(text: Any) -> list[Any]:
    mixed = getattr(text, "per_layer_config", None)
    return list(mixed) if mixed is not None else [text] * text.num_hidden_layers


def _sizes(layer: Any) -> LayerSizes:
    heads = layer.num_attention_heads
    head_dim = getattr(layer, "head_dim", None) or layer.hidden_size // heads
    return LayerSizes(heads, getattr(layer, "num_key_value_heads", None) or heads, head_dim)
