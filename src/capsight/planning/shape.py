"""`ModelShape`: what a plan needs to know of a model, read from its config and a model without memory."""

from __future__ import annotations

import copy
import math
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForImageTextToText
from transformers.cache_utils import DynamicCache

from capsight.errors import OptionError
from capsight.kvcapsule.cache.stock import has_states
from capsight.planning.vision import VisionShape, check_planned, merged_after
from capsight.text_layers import layer_sizes

_NOT_MULTIPLIED = ("embed_tokens", "position", "pos_embed", "cls_token", "mask_token", "lm_head")
_TO_TEXT = (
    *("merger", "projector", "connector", "downsample", "embed_vision", "aligner", "vision_projection"),
    *("head_linear", "visual_embeddings_table", "vision_adapter"),
)
_VISION = ("visual", "vision_tower", "vision_model", "vision_embedder", "vision_encoder")


@dataclass(frozen=True, slots=True)
class LayerShape:
    """One layer of the language model.

    Attributes:
        query_heads: Hq.
        kv_heads: Hkv; fewer than Hq with grouped-query attention, 0 in layers that keep a state instead.
        head_dim: channels per head (D).
        window: tokens a query sees at most, itself included; None: all.
        convolved: numbers in the state of the layer's causal convolution.
        recurrent: numbers in the recurrent state of linear attention; always kept in float32.
    """

    query_heads: int
    kv_heads: int
    head_dim: int
    window: int | None
    convolved: int = 0
    recurrent: int = 0

    @property
    def holds_capsules(self) -> bool:
        """Whether it has full attention, so that its vision tokens can be compressed."""
        return self.window is None and self.kv_heads > 0

    def state_bytes(self, itemsize: int) -> int:
        """Bytes of a request's states, however many tokens it has: `convolved * itemsize + 4 * recurrent`."""
        return self.convolved * itemsize + 4 * self.recurrent

    def kv_bytes(self, tokens: int, itemsize: int) -> int:
        """Bytes of exact keys and values: `2 * tokens * Hkv * D * itemsize`."""
        return 2 * tokens * self.kv_heads * self.head_dim * itemsize


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Sizes of a vision-language model.

    Attributes:
        layers: of the language model.
        parameters: all of them, shared ones once.
        linear: weights that one token of the language model is multiplied with, without the
            vocabulary; of a mixture of experts only the active ones.
        vocabulary: weights that give the logits of one token.
        vision: the vision tower and what leads from it to the language model.
        turned: share of a head's channels that RoPE turns.
    """

    layers: tuple[LayerShape, ...]
    parameters: int
    linear: int
    vocabulary: int
    vision: VisionShape
    turned: float = 1.0

    @classmethod
    def of(cls, config: Any) -> ModelShape:
        """Read a config; the model is built on the meta device, which takes no memory for weights.

        Args:
            config: of the whole vision-language model, of a family that `build_layout` knows.

        Raises:
            UnsupportedModelError: the family is not known.
            OptionError: plans do not know it, or transformers cannot build a model from the config.
        """
        check_planned(config)
        try:
            with torch.device("meta"):
                # transformers writes what dtype the model has into the config, and into those in it
                model = AutoModelForImageTextToText.from_config(copy.deepcopy(config))
        except (ValueError, TypeError, AttributeError, KeyError, RuntimeError, ZeroDivisionError) as error:
            reason = str(error).strip().splitlines()[0]
            raise OptionError(f"the config does not make a {config.model_type} model: {reason}") from error
        text, patch, token, pixels = _count_weights(model, config)
        return cls(
            layers=_layers(config),
            parameters=sum(p.numel() for p in model.parameters()),
            linear=text,
            vocabulary=model.get_output_embeddings().weight.numel(),
            vision=VisionShape.of(config, pixels, patch, token),
            turned=_turned(config.get_text_config(decoder=True)),
        )


def _turned(text: Any) -> float:
    rope = getattr(text, "rope_parameters", None) or {}
    rope = rope.get("full_attention", rope)
    whole = rope.get("rope_type") == "proportional"  # the others have a frequency of 0
    return 1.0 if whole else float(rope.get("partial_rotary_factor") or 1.0)


def _layers(config: Any) -> tuple[LayerShape, ...]:
    text = config.get_text_config(decoder=True)
    # The cache that transformers makes for the config decides which layers slide and which have states.
    return tuple(
        _with_states(text, sizes.query_heads)
        if has_states(layer)
        else LayerShape(*sizes, getattr(layer, "sliding_window", None))
        for sizes, layer in zip(layer_sizes(config), DynamicCache(config=config).layers, strict=True)
    )


def _with_states(text: Any, heads: int) -> LayerShape:
    """A layer of gated delta nets (Qwen3.5) or of short convolutions (LFM2)."""
    if hasattr(text, "linear_num_value_heads"):
        values = text.linear_num_value_heads * text.linear_value_head_dim
        channels = 2 * text.linear_num_key_heads * text.linear_key_head_dim + values
        recurrent = values * text.linear_key_head_dim
        return LayerShape(heads, 0, 0, None, channels * text.linear_conv_kernel_dim, recurrent)
    if hasattr(text, "conv_L_cache"):
        return LayerShape(heads, 0, 0, None, text.hidden_size * text.conv_L_cache)
    raise OptionError(f"the states of {text.model_type} layers are of a kind that is not planned for")


def _used(name: str, config: Any) -> float:
    """The share of patches that a weight of MiniCPM-V's vision tower is multiplied with."""
    layer = re.search(r"encoder\.layers\.(\d+)\.", name)
    if "vit_merger" in name and config.downsample_mode == "4x":
        return 0.0
    late = layer is not None and int(layer[1]) >= merged_after(config)
    return 0.25 if late or "vit_merger.linear" in name else 1.0


def _count_weights(model: nn.Module, config: Any) -> tuple[int, int, int, int]:
    """Weights in matrix products: per text token, per patch, per vision token, per patch of pixels."""
    text_config = config.get_text_config(decoder=True)
    experts = getattr(text_config, "num_experts", getattr(text_config, "n_routed_experts", None)) or 1
    active = getattr(text_config, "num_experts_per_tok", getattr(text_config, "top_k_experts", None)) or 1
    text = patch = token = pixels = 0
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2 or any(part in name for part in _NOT_MULTIPLIED):
            continue
        size = math.prod(parameter.shape)
        if config.model_type.startswith("minicpmv") and "vision_tower" in name:
            size = int(size * _used(name, config))
        if "vit_merger" in name:
            patch += size
        elif any(part in name for part in _TO_TEXT):
            token += size
        elif not any(part in name for part in _VISION):
            expert_weights = experts > 1 and parameter.ndim == 3 and parameter.shape[0] == experts
            text += size * active // experts if expert_weights else size
        elif parameter.ndim > 3:
            pixels += size
        else:
            patch += size
    return text, patch, token, pixels
