"""`Rotary`: how a model turns its keys by their positions (RoPE, M-RoPE), found by trying it out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from capsight.cache_argument import CACHE
from capsight.errors import CalibrationError, UnsupportedModelError
from capsight.execution import inputs_device
from capsight.layout.families import family_for

_REACH = 900
"""Furthest position at which a key is looked at, within what the model was trained for."""
_CLOSE = {torch.float32: 2e-3, torch.float64: 2e-3, torch.float16: 0.02, torch.bfloat16: 0.06}
"""Largest relative error of keys turned by what was found."""


@dataclass(frozen=True, eq=False)
class Rotary:
    """Rotary position embedding (RoFormer, arXiv 2104.09864; three axes: Qwen2-VL, arXiv 2409.12191).

    Attributes:
        frequencies: float64 `[P]`, radians per position of each pair of channels.
        axes: int64 `[P]`, which of t, h, w turns a pair: 0, 1 or 2; all 0 with one-dimensional positions.
        interleaved: pairs are channels (2 i, 2 i + 1); else (i, i + P).
        scaling: factor of the turned channels (YaRN); 1 for plain RoPE.

    Channels from 2 P on are not turned.
    """

    frequencies: Tensor
    axes: Tensor
    interleaved: bool
    scaling: float

    @cached_property
    def key(self) -> tuple[Any, ...]:
        """Equal for rotations that are equal."""
        return (*self.frequencies.tolist(), *self.axes.tolist(), self.interleaved, self.scaling)

    def tables(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines, scaled: float32 `[T, P]` each, of positions `[3, T]`."""
        device = positions.device
        angles = positions.double()[self.axes.to(device)].T * self.frequencies.to(device)
        return (angles.cos() * self.scaling).float(), (angles.sin() * self.scaling).float()

    def turn(self, keys: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Keys `[..., T, D]` turned by tables `[T, P]`; the first `2 P` channels, the others as they are."""
        rotated = 2 * len(self.axes)
        out = torch.empty_like(keys, dtype=torch.promote_types(keys.dtype, cos.dtype))
        (a, b), (x, y) = (self._pairs(each[..., :rotated]) for each in (keys, out))
        torch.mul(a, cos, out=x).addcmul_(b, sin, value=-1)
        torch.mul(b, cos, out=y).addcmul_(a, sin)
        out[..., rotated:] = keys[..., rotated:]
        return out

    def _pairs(self, whole: Tensor) -> tuple[Tensor, Tensor]:
        """First and second channels of all pairs."""
        if self.interleaved:
            return whole[..., ::2], whole[..., 1::2]
        first, second = whole.chunk(2, -1)
        return first, second

    def back(self, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Tables that undo what these do."""
        square = self.scaling**2
        return cos / square, -sin / square

    def unturn(self, keys: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Keys before RoPE: undoes `turn`."""
        return self.turn(keys, *self.back(cos, sin))


def check_reach(config: Any, positions: Tensor) -> None:
    """Refuse a prompt for which a model takes other frequencies than for short ones (longrope, dynamic NTK).

    Args:
        config: the model's config.
        positions: of all tokens that are read together, int64, any shape.

    Raises:
        UnsupportedModelError: it is as long as that.
    """
    rope = _rope(config)
    kind = str(rope.get("rope_type", "default"))
    first = rope.get("original_max_position_embeddings")
    if "dynamic" in kind:
        first = config.get_text_config(decoder=True).max_position_embeddings
    elif kind != "longrope":
        return
    end = int(positions.max()) + 1
    if first is not None and end > first:
        raise UnsupportedModelError(
            f"this prompt ends at position {end}; from {first} on this model turns keys otherwise ({kind} "
            "RoPE), which latents of the joint codec know nothing of; shorten it, or fit with codec='heads'"
        )


def _rope(config: Any) -> dict[str, Any]:
    """The rotary parameters of full-attention layers."""
    rope: dict[str, Any] = getattr(config.get_text_config(decoder=True), "rope_parameters", None) or {}
    return rope.get("full_attention", rope)


@torch.no_grad()
def find_rotary(model: Any, layers: Sequence[int]) -> Rotary:
    """How the full-attention `layers` of a model turn keys.

    One token is run on its own at several positions: it attends to nothing but itself, so its keys differ
    by their rotation alone, and not at all where full-attention layers have none (NoPE). Frequencies are
    those of the model's rotary module; which channels form a pair and which axis turns it is what explains
    the keys.

    Raises:
        CalibrationError: nothing that is known explains them, or layers differ.
    """
    decoder = model.get_decoder()
    positions = _tried(model.config)
    raw_keys = _keys_at(model, decoder, layers, positions)
    if not raw_keys.isfinite().all():
        raise CalibrationError(
            "calibration keys hold NaN or infinite values; run the model in float32 or bfloat16"
        )
    keys = raw_keys.double().cpu()  # [L, positions, H, D]
    if float((keys - keys[:, :1]).norm()) <= 1e-6 * float(keys.norm()):
        still = torch.zeros(keys.shape[-1] // 2)
        return Rotary(still.double(), still.long(), False, 1.0)
    frequencies, scaling = _frequencies(decoder)
    for interleaved in (False, True) if 2 * len(frequencies) <= keys.shape[-1] else ():
        axes = _axes(keys, len(frequencies), interleaved)
        rotary = Rotary(frequencies, axes, interleaved, scaling)
        cos, sin = (x.double() for x in rotary.tables(positions))
        plain = rotary.unturn(keys[:, :1].transpose(1, 2), cos[:1], sin[:1])  # [L, H, 1, D]
        turned = rotary.turn(plain.expand(-1, -1, len(cos), -1), cos, sin)
        error = (turned - keys.transpose(1, 2)).flatten(1).norm(dim=1) / keys.flatten(1).norm(dim=1)
        if float(error.max()) < _CLOSE.get(raw_keys.dtype, 0.06):
            return rotary
    raise CalibrationError(
        f"cannot tell how this {model.config.model_type} model turns keys by their positions; "
        "fit with codec='heads', which stores keys as they are"
    )


def as_turned_by(model: Any, rotary: Rotary) -> Rotary:
    """`rotary` with the frequencies of a model in hand, where rounding alone tells them apart.

    `model.to(torch.bfloat16)` rounds the model's: at position 500 a pair that turns by 1 is up to one radian
    off. What is known of keys before RoPE holds if they are turned back as they were turned.
    """
    inner = next((x for x in model.modules() if isinstance(x, PreTrainedModel)), model)
    try:
        found = _frequencies(inner.get_decoder())[0]
    except (CalibrationError, AttributeError, NotImplementedError):  # the last of a buffer on no device
        return rotary
    own = rotary.frequencies
    if found.shape != own.shape or torch.equal(found, own.cpu()):
        return rotary
    return replace(rotary, frequencies=found) if torch.allclose(found, own.cpu(), 2.0**-8, 1e-6) else rotary


def _tried(config: Any) -> Tensor:
    """Positions at which one token's key is looked at: int64 `[3, 6]`."""
    text = config.get_text_config(decoder=True)
    first = _rope(config).get("original_max_position_embeddings")
    far = min(_REACH, (first or text.max_position_embeddings) - 1)
    near = (37, 37, 37), (61, 5, 17)
    tried = (0, 0, 0), (far, 0, 0), (0, far, 0), (0, 0, far), *near
    return torch.tensor(tried).clamp_max(far).T


def _frequencies(decoder: Any) -> tuple[Tensor, float]:
    """Frequencies `[P]` and scaling of the rotary module of full-attention layers, as last used."""
    module = getattr(decoder, "rotary_emb", None)
    for prefix in ("", "full_attention_"):
        frequencies = getattr(module, f"{prefix}inv_freq", None)
        if isinstance(frequencies, Tensor) and frequencies.ndim == 1:
            return frequencies.double().cpu(), float(getattr(module, f"{prefix}attention_scaling", 1.0))
    raise CalibrationError(
        f"{type(decoder).__name__} has no rotary frequencies that capsight knows; fit with codec='heads'"
    )


def _keys_at(model: Any, decoder: Any, layers: Sequence[int], positions: Tensor) -> Tensor:
    """Keys of one token alone at each of `positions` `[3, n]`: `[L, n, H, D]`."""
    text = model.config.get_text_config(decoder=True)
    ids = torch.full(
        (positions.shape[1], 1), text.vocab_size // 2, device=inputs_device(model)
    )  # any of text
    places = positions[..., None] if family_for(model.config).position_rows > 1 else positions[0, :, None]
    cache = DynamicCache(config=model.config)
    decoder(input_ids=ids, position_ids=places.to(ids.device), **{CACHE: cache}, use_cache=True)
    cache_layers: list[Any] = cache.layers
    return torch.stack([cache_layers[layer].keys[:, :, 0].cpu() for layer in layers])


def _axes(keys: Tensor, pairs: int, interleaved: bool) -> Tensor:
    """The axis that moves each pair of channels most: int64 `[P]`."""
    whole = keys[..., : 2 * pairs]
    a, b = (whole[..., ::2], whole[..., 1::2]) if interleaved else whole.chunk(2, -1)
    moved = [((x[:, 1:4] - x[:, :1]) ** 2).sum((0, 2)) for x in (a, b)]  # [3, P] each
    return (moved[0] + moved[1]).argmax(0)
