"""Prefill FLOPs from the layout and the head map alone: a multiplication and an addition are two.

Attention counts the pairs of query and key that the mask leaves, `4 * D` FLOPs each (scores and
weighted values); what a kernel computes beside them, to fill its tiles, is not counted. Softmax,
norms and activations are not counted either, nor is the vision tower, which does the same work
with and without a head map.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from torch import nn

from capsight.blindsight.categories import Category, MaskOptions
from capsight.blindsight.head_map import HeadMap
from capsight.blindsight.rule import CAUSAL, BaseRule
from capsight.blindsight.spans import intervals, whole
from capsight.layout import PromptLayout


@dataclass(frozen=True, slots=True)
class PrefillFlops:
    """FLOPs of one prefill of the language model.

    Attributes:
        attention: of attention under the head map.
        attention_dense: of the model's own attention.
        linear: of all linear layers.
    """

    attention: int
    attention_dense: int
    linear: int

    @property
    def attention_saved(self) -> float:
        """Fraction of the attention FLOPs saved (0..1)."""
        return 1 - self.attention / self.attention_dense

    @property
    def saved(self) -> float:
        """Fraction of all FLOPs of the language model's prefill saved (0..1)."""
        return (self.attention_dense - self.attention) / (self.attention_dense + self.linear)


def visible_pairs(
    layout: PromptLayout, category: Category, options: MaskOptions | None = None, rule: BaseRule = CAUSAL
) -> int:
    """How many pairs of query and key a head of some category computes, over all rows of a batch."""
    chosen = options or MaskOptions()
    return sum(int(intervals(row, category, chosen, rule, whole(row)).pairs().sum()) for row in layout.rows)


def attention_flops(
    layout: PromptLayout, head_map: HeadMap, head_dim: int, rules: tuple[BaseRule, ...] = (CAUSAL,)
) -> int:
    """FLOPs of attention in all layers of a head map.

    Args:
        layout: of the batch.
        head_map: the category of every head.
        head_dim: channels per head (D).
        rules: one per layer; layers without one have the last of these.
    """
    total = 0
    known: dict[tuple[Category, BaseRule], int] = {}
    for layer, categories in enumerate(head_map.categories):
        rule = rules[min(layer, len(rules) - 1)]
        for category, heads in Counter(categories).items():
            if (category, rule) not in known:
                known[category, rule] = visible_pairs(layout, category, head_map.options, rule)
            total += 4 * head_dim * heads * known[category, rule]
    return total


def prefill_flops(model: Any, layout: PromptLayout, head_map: HeadMap) -> PrefillFlops:
    """FLOPs of a prefill of a model's language part, with logits for the last token of each row.

    Args:
        model: a transformers vision-language model whose layers are `torch.nn.Linear` (no mixture of
            experts: those count as nothing here).
        layout: of the batch; padding goes through the linear layers too.
        head_map: the category of every head.
    """
    text = model.config.get_text_config(decoder=True)
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    rules = layer_rules(model.config, head_map.num_layers)
    dense = HeadMap.all_dense(head_map.num_layers, head_map.num_heads)
    weights = sum(m.weight.numel() for m in model.get_decoder().modules() if isinstance(m, nn.Linear))
    vocabulary = model.get_output_embeddings().weight.numel()
    tokens = layout.batch_size * layout.length
    return PrefillFlops(
        attention=attention_flops(layout, head_map, head_dim, rules),
        attention_dense=attention_flops(layout, dense, head_dim, rules),
        linear=2 * (tokens * weights + layout.batch_size * vocabulary),
    )


def layer_rules(config: Any, layers: int) -> tuple[BaseRule, ...]:
    """The rule of every layer, from the config of a vision-language model.

    Args:
        config: `model.config`.
        layers: how many there are.
    """
    text = config.get_text_config(decoder=True)
    types = getattr(text, "layer_types", None) or ["full_attention"] * layers
    windows = [text.sliding_window if kind == "sliding_attention" else None for kind in types]
    return tuple(BaseRule.of(config, window) for window in windows[:layers])
