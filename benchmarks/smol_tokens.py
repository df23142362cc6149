"""What the benchmarks of capsight-smol share: a prompt's prefix, its keys before RoPE, its values."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
from judging.smol.asks import Prompt
from judging.smol.packed import Packer
from judging.smol.see import pixels


@contextmanager
def recording(language_model: Any) -> Iterator[list[dict[str, Tensor]]]:
    """Each layer's outputs of the key and value maps, [S, KV heads x head size], of the last pass."""
    heard: list[dict[str, Tensor]] = [{} for _ in language_model.layers]
    hooks = []
    for layer, found in zip(language_model.layers, heard, strict=True):
        for name in ("k", "v"):

            def keep(
                _: Any, __: Any, out: Tensor, found: dict[str, Tensor] = found, name: str = name
            ) -> None:
                found[name] = out[0].float()

            hooks.append(getattr(layer.self_attn, f"{name}_proj").register_forward_hook(keep))
    try:
        yield heard
    finally:
        for hook in hooks:
            hook.remove()


def prefix_of(model: Any, packer: Packer, prompt: Prompt) -> tuple[Tensor, Tensor]:
    """The embeddings of the turn that shows the images, [1, P, width], and which of them are image tokens."""
    ids = torch.tensor([packer.prefix(len(prompt.pictures))])
    images = pixels(list(prompt.pictures)).to(model.dtype)
    inner = model.model
    tokens = inner.connector(inner.vision_model(images).last_hidden_state).flatten(0, 1)
    seen = ids[0] == model.config.image_token_id
    embeds = inner.text_model.embed_tokens(ids).clone()
    embeds[0, seen] = tokens.to(embeds.dtype)
    return embeds, seen


def joint(heard: list[dict[str, Tensor]], seen: Tensor) -> Tensor:
    """[tokens, layers x 2 x KV heads x head size] keys and values, layer by layer, keys first."""
    return torch.cat([layer[name][seen] for layer in heard for name in ("k", "v")], 1)
