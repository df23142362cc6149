"""Vision tokens dropped before the language model reads them: its prefill is shorter, too.

- `diverse`: those that lie farthest apart (cosine distance of their embeddings, greedily, over the whole
  prompt), after DivPrune, https://arxiv.org/abs/2503.02175.
- `distinct`: pixels that equal an earlier token's of the same picture are dropped, after PixelPrune (vLLM
  pull request 45106); how many those are is up to the pictures.

Tokens keep the positions that they had, and all layers and heads the same tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers import PreTrainedConfig
from transformers.cache_utils import DynamicCache

from capsight.baselines.observing import Observation, ObservingBaseline, ObservingCache, ObservingLayer
from capsight.baselines.seen import Seen
from capsight.kvcapsule.plan import Run
from capsight.layout import PromptLayout
from capsight.layout.positions import position_ids


class Given:
    """What a model was given with its last prompt: pixels, and embeddings of tokens `[1, S, E]`."""

    def __init__(self, model: Any) -> None:
        """Watch a model from now on."""
        self.decoder = model.get_decoder()
        self.pixels = self.embeds = torch.empty(0)
        names = ("visual", "vision_tower", "vision_model")
        tower = next(getattr(model.model, name) for name in names if hasattr(model.model, name))
        tower.register_forward_pre_hook(self._note_pixels, with_kwargs=True)
        self.decoder.register_forward_pre_hook(self._note_embeds, with_kwargs=True)

    def _note_pixels(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        self.pixels = args[0] if args else kwargs["pixel_values"]
        self.embeds = torch.empty(0)

    def _note_embeds(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if not self.embeds.numel():
            self.embeds = kwargs["inputs_embeds"]

    def token_pixels(self, count: int) -> Tensor:
        """The pixels of each of `count` vision tokens, `[T, P]`."""
        if self.pixels.ndim == 2:  # patches of the Qwen-VL families, those of a token together
            return self.pixels.reshape(count, -1)
        # InternVL, SmolVLM: square pictures, tokens row by row
        pictures, _, height, width = self.pixels.shape
        side = round((count / pictures) ** 0.5)
        return self.pixels.unfold(2, height // side, height // side).unfold(
            3, width // side, width // side
        ).permute(0, 2, 3, 1, 4, 5).reshape(count, -1)  # fmt: skip


def diverse(embeds: Tensor, count: int) -> Tensor:
    """The `count` of `[T, E]` that lie farthest apart: bool `[T]`."""
    unit = normalize(embeds.float(), dim=-1)
    distance = 1 - unit @ unit.T
    nearest = distance + 2 * torch.eye(len(unit))
    keep = torch.zeros(len(unit), dtype=torch.bool)
    last = int(nearest.amin(1).argmax())
    least = torch.full((len(unit),), torch.inf)
    for _ in range(count):
        keep[last] = True
        least = torch.minimum(least, distance[last]).masked_fill(keep, -torch.inf)
        last = int(least.argmax())
    return keep


def distinct(pixels: Tensor, blocks: Sequence[int]) -> Tensor:
    """The first of equal rows among each of the blocks `[n, P]` that `[T, P]` is made of: bool `[T]`."""
    keep = []
    for part in pixels.split(list(blocks)):
        inverse = torch.unique(part, dim=0, return_inverse=True)[1]
        first = torch.full((int(inverse.max()) + 1,), len(part))
        first.scatter_reduce_(0, inverse, torch.arange(len(part)), "amin")
        own = torch.zeros(len(part), dtype=torch.bool)
        own[first] = True
        keep.append(own)
    return torch.cat(keep)


class Pruning(ObservingBaseline):
    """Prefill without some of the vision tokens."""

    joint = False

    def __init__(self, name: str, given: Given, retained: float, block_size: int) -> None:
        """Choose "diverse" or "distinct"; `given` watches the model."""
        super().__init__(retained, block_size)
        self.name, self._given = name, given  # type: ignore[misc]

    @property
    def label(self) -> str:
        """Name and budget, where there is one."""
        return super().label if self.name == "diverse" else self.name

    def look(self, seen: Seen, runs: Sequence[Run]) -> Observation:
        """Not used: what to keep is known before."""
        raise NotImplementedError

    def choose(self, observed: Sequence[Observation], runs: Sequence[Run]) -> Sequence[Tensor]:
        """Not used: what to keep is known before."""
        raise NotImplementedError

    def _new_cache(self, layout: PromptLayout, config: PreTrainedConfig) -> PrunedCache:
        return PrunedCache(self, layout, config)

    def kept_tokens(self, layout: PromptLayout) -> Tensor:
        """Which of the S tokens of a prompt the language model reads: bool `[S]`."""
        blocks = layout.rows[0].blocks
        places = torch.cat([torch.arange(block.start, block.end) for block in blocks])
        if self.name == "diverse":
            chosen = diverse(self._given.embeds[0, places], round(self.retained * len(places)))
        else:
            pixels = self._given.token_pixels(len(places))
            chosen = distinct(pixels, [block.end - block.start for block in blocks])
        keep = torch.ones(layout.length, dtype=torch.bool)
        keep[places] = chosen
        return keep

    @torch.no_grad()
    def prefill(
        self, layout: PromptLayout, config: PreTrainedConfig, keep: Tensor
    ) -> list[tuple[Tensor, Tensor]]:
        """Keys and values `[1, H, S, D]` of each layer, zeros for tokens that are not read."""
        positions = position_ids(layout, config)
        if positions is None:
            positions = torch.arange(layout.length)[None]
        cache, embeds = DynamicCache(), self._given.embeds[:, keep]
        self._given.decoder(
            inputs_embeds=embeds,
            position_ids=positions[..., keep],
            attention_mask=torch.ones(1, embeds.shape[1], dtype=torch.int64),
            past_key_values=cache,
            use_cache=True,
        )
        states = []
        for layer in cache.layers:
            full = [x.new_zeros(1, x.shape[1], layout.length, x.shape[3]) for x in (layer.keys, layer.values)]
            for whole, part in zip(full, (layer.keys, layer.values), strict=True):
                whole[:, :, keep] = part
            states.append((full[0], full[1]))
        return states


class PrunedCache(ObservingCache):
    """Holds what a pruned prefill gave, instead of what it is handed."""

    _method: Pruning

    def __init__(self, method: Pruning, layout: PromptLayout, config: PreTrainedConfig) -> None:
        """Make an empty cache for one prompt, the one that `method` has last seen its model read."""
        super().__init__(method, layout, config)
        self._layout, self._config = layout, config
        self._keep: Tensor | None = None
        self._read: list[tuple[Tensor, Tensor]] = []

    def update(
        self, key_read: Tensor, value_read: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Put the pruned prefill in the place of the other one."""
        if not self.layers[layer_idx].get_seq_length():
            if self._keep is None:
                self._keep = self._method.kept_tokens(self._layout)
                self._read = self._method.prefill(self._layout, self._config, self._keep)
            key_read, value_read = self._read[layer_idx]
        return super().update(key_read, value_read, layer_idx, *args, **kwargs)

    def observe(
        self, layer_idx: int, query: Tensor, key: Tensor, attention_mask: Tensor | None, scaling: float
    ) -> None:
        """Keep what was read."""
        layer = self.layers[layer_idx]
        if isinstance(layer, ObservingLayer) and layer.pending:
            assert self._keep is not None
            size, heads = self._method.block_size, key.shape[1]
            own = [self._keep[run.start : run.start + size].expand(heads, -1) for run in layer.pending]
            layer.thin(torch.stack(own))
