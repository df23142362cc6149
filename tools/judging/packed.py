"""Attention of packed rows while a judge learns: every question sees its pictures and itself, nothing else.

The language model runs on all tokens as one row `[prefixes B x P, then groups B x Q x T]`; only attention
knows what belongs together. On the way it measures where some heads look (the pointing lesson of the
reference VLM, `reference_training.pointing`): answers alone teach a small model what is found by a
word very slowly.
"""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from judging.lessons import Group, Lesson

_NAME = "capsight_packed"

#: slot: (layer, share of the query heads before it) of the heads that learn where to look.
SLOTS = {
    "picture": ((0, 0.0),),  # a vision token -> the number of its picture
    "twin": ((1, 0.75),),  # a vision token -> the same cell of the picture before
    "number": ((1, 0.0),),  # an answer -> the number in its question
    "subject": ((1, 0.5), (3, 0.5)),  # an answer -> the words of its question that say what
    "look": ((2, 0.0), (4, 0.0)),  # an answer -> where it is to be seen
    "other": ((2, 0.5), (4, 0.5)),  # the same, or the second of two things
}


class Packed:
    """Gives a language model this attention; `begin` says what the next forward holds."""

    def __init__(self, language_model: Any) -> None:
        """Register the attention and switch the model to it."""
        AttentionInterface.register(_NAME, self._attention)
        AttentionMaskInterface.register(_NAME, lambda *args, **kwargs: None)
        language_model.set_attn_implementation(_NAME)
        self.losses: dict[str, list[Tensor]] = {}

    def begin(self, lesson: Lesson, tokens: int) -> None:
        """Take the shapes and targets of a lesson; `tokens` is the number of vision tokens of a picture."""
        self.groups = lesson.groups
        self.batch, self.width = lesson.groups[0].ids.shape[0], len(lesson.prefix)
        self.causal = torch.full((self.width, self.width), -torch.inf).triu(1)
        self.losses = {}
        firsts = lesson.firsts
        self.picture = [(f + i, f - 2) for f in firsts for i in range(tokens)]
        self.twin = [(f + i, g + i) for g, f in pairwise(firsts) for i in range(tokens)]

    def loss(self) -> tuple[Tensor | float, dict[str, float]]:
        """The summed loss of the last forward, and each slot's attention on its target (geometric mean)."""
        total = sum((one for many in self.losses.values() for one in many), start=0.0)
        return total, {
            f"see_{n}": float(torch.exp(-torch.stack(many).detach().mean()))
            for n, many in self.losses.items()
        }

    def _slots(self, layer: int, heads: int) -> list[tuple[str, int]]:
        return [(n, int(share * heads)) for n, where in SLOTS.items() for at, share in where if at == layer]

    @torch.compiler.disable
    def _attention(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
    ) -> tuple[Tensor, None]:
        B, P = self.batch, self.width
        H, K, D = query.shape[1], key.shape[1], query.shape[3]
        G = H // K
        slots = self._slots(module.layer_idx, H)  # type: ignore[arg-type]
        sizes = [B * P, *(g.ids.numel() for g in self.groups)]
        q, k, v = (x.split(sizes, 1) for x in (query[0] * kwargs["scaling"], key[0], value[0]))

        def rows(x: Tensor, n: int, t: int) -> Tensor:
            """Tokens of n rows as [n * K, heads of a KV head * t, D]."""
            return x.view(K, x.shape[0] // K, n, t, D).permute(2, 0, 1, 3, 4).reshape(n * K, -1, D)

        kp, vp = rows(k[0], B, P), rows(v[0], B, P)
        scores = (rows(q[0], B, P) @ kp.mT).view(B, H, P, P) + self.causal.to(query.dtype)
        for name, head in slots:
            pairs = {"picture": self.picture, "twin": self.twin}.get(name)
            if pairs:
                at, to = (torch.tensor(x) for x in zip(*pairs, strict=True))
                chances = scores[:, head].float().log_softmax(-1)
                self.losses.setdefault(name, []).append(-chances[:, at, to].mean())
        out = [_heads_last(scores.softmax(-1).view(B * K, G * P, P) @ vp, B, H, P)]
        for group, qg, kg, vg in zip(self.groups, q[1:], k[1:], v[1:], strict=True):
            _, Q, T = group.ids.shape
            far = rows(qg, B, Q * T) @ kp.mT
            near = rows(qg, B * Q, T) @ rows(kg, B * Q, T).mT
            near = near.view(B * Q, H, T, T) + self.causal[:T, :T].to(query.dtype)
            both = torch.cat(
                [
                    far.view(B, H, Q, T, P),
                    near.view(B, Q, H, T, T).transpose(1, 2),
                ],
                -1,
            )
            self._measure(group, both, slots)
            chances = both.softmax(-1)
            seen = chances[..., :P].reshape(B * K, G * Q * T, P) @ vp
            seen = seen.view(B, H, Q, T, D).permute(0, 2, 3, 1, 4)
            said = chances[..., P:].transpose(1, 2).reshape(B * Q * K, G * T, T) @ rows(vg, B * Q, T)
            out.append((seen + said.view(B, Q, H, T, D).transpose(2, 3)).reshape(B * Q * T, H, D))
        return torch.cat(out)[None], None

    def _measure(self, group: Group, both: Tensor, slots: list[tuple[str, int]]) -> None:
        B, _, Q, T, _ = both.shape
        P = self.width
        for name, head in slots:
            if name in ("look", "other", "number", "subject"):
                target = getattr(group, name)
                chances = both[:, head].float().log_softmax(-1)
                if name in ("look", "other"):
                    chances = chances[..., :P].reshape(B, Q * T, P)
                else:
                    chances = chances[..., P:].reshape(B * Q, T, T).clamp_min(-60)
                total = target.sum().clamp_min(1)
                self.losses.setdefault(name, []).append(-(chances * target).sum() / total)


def _heads_last(x: Tensor, n: int, heads: int, tokens: int) -> Tensor:
    return x.reshape(n, heads, tokens, -1).transpose(1, 2).reshape(n * tokens, heads, -1)


def fast_tower(judge: Any, visual: Any) -> None:
    """Let a Qwen tower embed patches by a matrix product, and attend to equal pictures in one go."""
    proj = visual.patch_embed.proj
    visual.patch_embed.forward = lambda x: nn.functional.linear(x, proj.weight.flatten(1), proj.bias)
    from transformers.models.qwen2_vl.modeling_qwen2_vl import apply_rotary_pos_emb_vision

    patches = 4 * judge.grid**2

    def attend(
        self: Any, x: Tensor, cu_seqlens: Tensor, position_embeddings: Any = None, **kwargs: Any
    ) -> Tensor:
        n, heads = x.shape[0], self.num_heads
        q, k, v = self.qkv(x).view(n, 3, heads, -1).unbind(1)
        q, k = apply_rotary_pos_emb_vision(q, k, *position_embeddings)
        q, k, v = (t.to(v.dtype).view(n // patches, patches, heads, -1).transpose(1, 2) for t in (q, k, v))
        out = ((q * self.scaling) @ k.mT).softmax(-1) @ v
        return self.proj(out.transpose(1, 2).reshape(n, -1))

    for block in visual.blocks:
        block.attn.forward = attend.__get__(block.attn)
