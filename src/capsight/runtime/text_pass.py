"""Text read anew around images whose latents are known: one pass of the model over the text tokens alone.

A latent knows no position, so the images' keys are turned to where they stand now. Text tokens see what
stands before them, images and text, as they would in a prefill; no pixel is looked at.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from capsight.attention_swap import attention_fits
from capsight.cache_argument import CACHE
from capsight.execution import module_device, own_precision
from capsight.kvcapsule.cache.stock import full_attention_layers
from capsight.kvcapsule.codecs import JointCodec, Payload
from capsight.kvcapsule.codecs.positions import TokenPositions
from capsight.kvcapsule.codecs.rotary import check_reach
from capsight.layout import PromptLayout
from capsight.layout.positions import position_ids, rope_positions
from capsight.runtime.state import RuntimeState, running
from capsight.runtime.switch import capsight_attention_on


def can_read_text(config: Any) -> bool:
    """Whether text can be read without the images' pixels: all layers have full attention.

    Layers with states or sliding windows hold more of the images than latents do, and Ovis2's vision tower
    has embeddings of its own for the tokens around tiles.
    """
    if getattr(config, "visual_indicator_token_ids", None) is not None:
        return False
    return len(full_attention_layers(config)) == config.get_text_config(decoder=True).num_hidden_layers


@torch.no_grad()
def read_text(
    model: Any,
    codecs: Mapping[int, Any],
    layout: PromptLayout,
    input_ids: Tensor,
    payload: Payload,
    positions: TokenPositions | None = None,
) -> dict[int, Tensor]:
    """Keys and values of the text of one prompt.

    Args:
        model: the model.
        codecs: joint codec of every layer.
        layout: of the prompt, one row without padding.
        input_ids: int64 `[1, S]`; what stands for vision tokens in it is not read.
        payload: latents of all its vision tokens, in order.
        positions: that their keys are turned to; by default where they stand.

    Returns:
        `[2, E, H, D]` of its E text tokens, by layer.
    """
    row = layout.rows[0]
    device = module_device(model.get_input_embeddings())
    vision = torch.zeros(layout.length, dtype=torch.bool)
    for block in row.blocks:
        vision[block.start : block.end] = True
    text = (~vision).nonzero().flatten()
    everywhere = rope_positions(layout, model.config)
    check_reach(model.config, everywhere)
    positions = positions or TokenPositions(everywhere[:, 0, vision])
    images = _Images(payload, positions)
    places = position_ids(layout, model.config)
    text_positions = text[None] if places is None else places[..., text]
    hidden = torch.finfo(model.dtype).min
    mask = torch.zeros(len(text), layout.length, dtype=model.dtype, device=device)
    mask.masked_fill_((torch.arange(layout.length) > text[:, None]).to(device), hidden)
    cache = Cache(layers=[_Gaps(codecs[i], images, vision) for i in sorted(codecs)])
    # where attention caps scores, the model's own takes the mask as well
    swap = capsight_attention_on(model) if attention_fits(model) else nullcontext()
    with running(RuntimeState(generating=True)), swap:
        model(
            input_ids=input_ids[:, text].to(device),
            attention_mask=mask[None, None],
            position_ids=text_positions.to(device),
            use_cache=True,
            logits_to_keep=1,
            **{CACHE: cache},
        )
    layers: list[Any] = cache.layers
    return {i: layer.text for i, layer in zip(sorted(codecs), layers, strict=True)}


class _Images:
    """Latents and their positions, on every device that layers lie on."""

    def __init__(self, payload: Payload, positions: TokenPositions) -> None:
        self._payload, self._thw = payload, positions.thw
        self._at: dict[torch.device, tuple[Payload, TokenPositions]] = {}

    def at(self, device: torch.device) -> tuple[Payload, TokenPositions]:
        if device not in self._at:
            tensors = {name: tensor.to(device) for name, tensor in self._payload.tensors.items()}
            self._at[device] = type(self._payload)(tensors), TokenPositions(self._thw.to(device))
        return self._at[device]


class _Gaps(DynamicLayer):
    """A layer that is given text and returns it with the images where they stand."""

    def __init__(self, codec: JointCodec, images: _Images, vision: Tensor) -> None:
        super().__init__()
        self._codec, self._images, self._vision = codec, images, vision

    def get_seq_length(self) -> int:
        return 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return len(self._vision), 0

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Take keys and values `[1, H, E, D]` of text; returns `[1, H, S, D]` of all tokens."""
        self._codec.to(key_states.device)
        wide = torch.promote_types(key_states.dtype, value_states.dtype)  # autocast gives them two dtypes
        key_states, value_states = key_states.to(wide), value_states.to(wide)
        with own_precision(key_states.device):
            images = self._codec.decode_at(*self._images.at(key_states.device), key_states.dtype)
        vision, parts = self._vision.to(key_states.device), []
        for new, known in zip((key_states, value_states), images, strict=True):
            full = new.new_empty(1, len(vision), new.shape[1], new.shape[3])
            full[:, vision], full[:, ~vision] = known[:, :, 0], new.transpose(1, 2)
            parts.append(full.transpose(1, 2))
        self.text = torch.stack((key_states[0].transpose(0, 1), value_states[0].transpose(0, 1)))
        return parts[0], parts[1]
