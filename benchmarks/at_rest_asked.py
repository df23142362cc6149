"""What `at_rest.py` asks: caches that were at rest, images read elsewhere, and the rival's rounded tower."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial, wraps
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

from capsight import KVCapsule, enable
from capsight.evaluation.asking import split_questions
from capsight.evaluation.sharing import Asking, _Prompt
from capsight.kvcapsule.cache.conversation import Conversation
from capsight.kvcapsule.codecs.positions import TokenPositions
from capsight.kvcapsule.rest import load_rest, save_rest
from capsight.kvcapsule.rest.latents import code, decode
from capsight.kvcapsule.rest.parts import joint_codec, open_latents, packed
from capsight.layout import build_layout
from capsight.layout.positions import rope_positions
from capsight.runtime.text_pass import read_text

STORED = 0.98
"""Quality of images that are taken from elsewhere."""


class Prompt(_Prompt):
    """One item; its questions are asked over caches that are made here."""

    def __init__(self, asking: Asking, item: Any, capsule: KVCapsule) -> None:
        """Read the item."""
        super().__init__(asking, item, None)
        self.model, self.capsule, self.codec = asking.model, capsule, joint_codec(capsule)
        self.layout = self._layout
        self.ids = self._prefill.tokens["input_ids"]

    def joint(self, capsule: KVCapsule) -> Any:
        """The joint cache, with what it has read."""
        cache = self._prefill.cache(capsule)
        names = tuple("" for _ in range(self.layout.num_images))
        cache.conversation = Conversation(self.layout, self.ids, self.ids.shape[1], (names,))
        return cache

    def said(self, cache: Any) -> list[str]:
        """Answers over a cache that was made here."""
        if not isinstance(cache, DynamicCache):
            self._prefill._lean.add(cache)
        tokens, _ = self._over(cache)
        if self._drafts is None:
            self._drafts = tokens
        return [t.strip() for t in self._processor.tokenizer.batch_decode(tokens, skip_special_tokens=True)]

    def rest(self, quality: float, capsule: KVCapsule) -> tuple[Any, int, float, float]:
        """A cache that was in a file; the file's bytes, seconds to write and to read."""
        cache = self.joint(capsule)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "x"
            start = time.perf_counter()
            save_rest(path, cache, capsule, quality, True)
            wrote = time.perf_counter()
            devices = {i: torch.device("cpu") for i in capsule.codecs}
            reread = partial(read_text, self.model, capsule.codecs)
            again = load_rest(path, capsule, self.model.config, devices, self.model.dtype, reread)
            return again, path.stat().st_size, wrote - start, time.perf_counter() - wrote

    def full(self, latents: torch.Tensor, thw: torch.Tensor) -> DynamicCache:
        """The full cache of latents `[T, R]`, keys turned to positions `[3, T]`; text is read anew."""
        payload, places = packed(latents, self.codec), TokenPositions(thw)
        text = read_text(self.model, self.capsule.codecs, self.layout, self.ids, payload, places)
        vision = torch.zeros(self.layout.length, dtype=torch.bool)
        for block in self.layout.rows[0].blocks:
            vision[block.start : block.end] = True
        cache = DynamicCache(config=self.model.config)
        for index, codec in self.capsule.codecs.items():
            parts = []
            for own, known in zip(
                text[index], codec.decode_at(payload, places, own_dtype(text)), strict=True
            ):
                whole = own.new_empty(1, self.layout.length, *own.shape[1:])
                whole[:, vision], whole[:, ~vision] = known[:, :, 0], own
                parts.append(whole.transpose(1, 2))
            cache.update(*parts, index)
        return cache


def own_dtype(text: dict[int, torch.Tensor]) -> torch.dtype:
    """Of the numbers of text."""
    return next(iter(text.values())).dtype


def alone(prompt: Prompt, processor: Any, item: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents of each picture read by itself, and the positions that it had then; from at rest."""
    latents, places = [], []
    for image in item.images:
        single = type(item)(item.name, (image,), item.asks)
        head, _ = split_questions(prompt.model, processor, single, [item.asks[0].question])
        with enable(prompt.model, capsule=prompt.capsule) as fast:
            z = open_latents(fast.encapsulate(**head), prompt.codec)
        layout = build_layout(head, prompt.model.config)
        piece = code(z, prompt.codec.lost, STORED)
        latents.append(decode(piece, len(z), prompt.codec.levels.rank))
        own = rope_positions(layout, prompt.model.config)
        places += [own[:, 0, b.start : b.end] for b in layout.rows[0].blocks]
    return torch.cat(latents), torch.cat(places, 1)


@contextmanager
def coarse_tower(model: Any, bits: int) -> Iterator[list[int]]:
    """Inside the block the vision tower's output has so many bits a number; gives the bytes."""
    spent = [0]
    inner = model.model

    def rounded(x: torch.Tensor) -> torch.Tensor:
        top = 2 ** (bits - 1) - 1
        scale = (x.abs().amax(-1, keepdim=True) / top).clamp_min(1e-12)
        spent[0] += x.shape[:-1].numel() * (x.shape[-1] * bits / 8 + 2)
        return (x / scale).round().clamp(-top, top) * scale

    original = inner.get_image_features

    @wraps(original)
    def features(*args: Any, **kwargs: Any) -> Any:
        out = original(*args, **kwargs)
        if isinstance(out, torch.Tensor):
            return rounded(out)
        pooled = out.pooler_output
        out.pooler_output = (
            rounded(pooled) if isinstance(pooled, torch.Tensor) else tuple(map(rounded, pooled))
        )
        return out

    inner.get_image_features = features
    try:
        yield spent
    finally:
        del inner.get_image_features
