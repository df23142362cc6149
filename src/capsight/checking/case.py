"""`Case`: a model to check, prompts for it, and what it answers with a full cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import capsight
from capsight.kvcapsule import KVCapsule
from capsight.layout import PromptLayout, build_layout
from capsight.runtime.decode import Decode

Prompt = tuple[Sequence[Image.Image], str]
BLOCK = 16
"""Vision tokens per capsule, so that small pictures of a tiny model make several."""
NEW = 5
"""Tokens generated in a check."""


@dataclass
class Case:
    """One model class under examination.

    Attributes:
        model: of that class, in eval mode and float32; random weights do.
        make: a left-padded batch of processor outputs from `[(pictures, text), ...]`.
        sizes: two picture sizes (width, height), in pixels.
        make_video: a batch of processor outputs with videos; None where the family takes none.
    """

    model: Any
    make: Callable[[Sequence[Prompt]], Mapping[str, Any]]
    sizes: tuple[tuple[int, int], tuple[int, int]]
    make_video: Callable[[], Mapping[str, Any]] | None = None
    _fits: dict[str, KVCapsule] = field(default_factory=dict)

    @cached_property
    def rows(self) -> list[Prompt]:
        """Two pictures of different sizes, one picture, none."""
        first, second = self.sizes
        several = [picture(0, first), picture(1, second)]
        return [(several, "what do you see here?"), ([picture(2, first)], "hi"), ([], "only text")]

    @cached_property
    def batch(self) -> dict[str, Any]:
        """All of `rows` as one batch."""
        return dict(self.make(self.rows))

    @cached_property
    def layout(self) -> PromptLayout:
        """Of `batch`."""
        return build_layout(self.batch, self.model.config)

    @cached_property
    def full(self) -> Any:
        """What the model alone answers to `batch`."""
        return self.generate(self.model.generate, self.batch)

    def capsule(self, codec: str = "heads", retained: float = 1.0) -> KVCapsule:
        """Fitted to the model on two pictures."""
        if codec not in self._fits:
            samples = [self.make([([picture(seed, self.sizes[0])], "hi")]) for seed in (90, 91)]
            self._fits[codec] = KVCapsule.fit(
                self.model, None, samples, 1.0, codec, BLOCK, progress=False, budget="uniform"
            )
        return self._fits[codec].with_retained(retained)

    def generate(self, generate: Callable[..., Any], inputs: Mapping[str, Any], **options: Any) -> Any:
        """Greedy tokens `[B, S + NEW]`, none of them an image's, and their logits."""
        config = self.model.config
        vision = [getattr(config, name, None) for name in ("image_token_id", "video_token_id")]
        options |= {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}
        options["suppress_tokens"] = [token for token in vision if token is not None]
        with torch.no_grad():
            return generate(**inputs, **options, output_logits=True, return_dict_in_generate=True)

    def answer(
        self, inputs: Mapping[str, Any], capsule: KVCapsule, decode: Decode | None = None
    ) -> tuple[Any, Any]:
        """What the model answers with capsules, and the cache."""
        with capsight.enable(self.model, capsule=capsule, decode=decode) as fast:
            return self.generate(fast.generate, inputs), fast.cache


def same(ours: Any, theirs: Any) -> str:
    """Compare two answers: the largest difference of their logits, in words.

    Raises:
        AssertionError: other tokens were generated, or a logit differs by more than 1e-4.
    """
    assert torch.equal(ours.sequences, theirs.sequences), "other tokens than with the full cache"
    worst = max(float((a - b).abs().max()) for a, b in zip(ours.logits, theirs.logits, strict=True))
    assert worst <= 1e-4, f"logits differ by {worst:.1e}"
    return f"logits within {worst:.0e}"


def continued(tokens: Tensor, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """A further turn of text after `tokens` `[B, S]`: some of the prompt's last tokens again, no pixels."""
    turn = torch.cat([tokens, inputs["input_ids"][:, -4:]], 1)
    mask = inputs["attention_mask"]
    more = turn.shape[1] - mask.shape[1]
    return {"input_ids": turn, "attention_mask": torch.nn.functional.pad(mask, (0, more), value=1)}


def picture(seed: int, size: tuple[int, int]) -> Image.Image:
    """A picture of `size` (width, height) made of 8 x 8 random colours."""
    colours = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(colours).resize(size, Image.Resampling.BICUBIC)
