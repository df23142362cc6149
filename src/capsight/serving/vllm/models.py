"""vLLM's own model classes under the names that exported checkpoints ask for.

What vLLM cannot say in a config is put right here: rotary frequencies of the type "longrope" together with
M-RoPE, of which vLLM makes an embedding without M-RoPE. And latents need what vLLM's attention is not told:
where the tokens of an image stand (`PlacedRange`), and all layers' keys before the first layer may attend to
them (`second_pass`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from vllm.forward_context import get_forward_context, override_forward_context
from vllm.model_executor.layers.rotary_embedding import MRotaryEmbedding
from vllm.model_executor.models.qwen2_5_vl import Qwen2_5_VLForConditionalGeneration
from vllm.model_executor.models.qwen2_vl import Qwen2VLForConditionalGeneration
from vllm.multimodal.inputs import PlaceholderRange

from capsight.serving.vllm.latent_steps import Placed
from capsight.serving.vllm.settings import check_engine


class FactoredMRotaryEmbedding(MRotaryEmbedding):
    """M-RoPE whose frequencies are divided one by one."""

    def __init__(self, factors: Sequence[float], *arguments: Any, **options: Any) -> None:
        """Take the divisor of each frequency, and what `MRotaryEmbedding` takes."""
        self.factors = tuple(factors)
        super().__init__(*arguments, **options)

    def _compute_inv_freq(self, base: float) -> torch.Tensor:
        positions = torch.arange(0, self.rotary_dim, 2, dtype=torch.int64).float() / self.rotary_dim
        return 1.0 / (torch.tensor(self.factors, dtype=torch.float32) * base**positions)


def put_right(model: Any, config: Any, dtype: torch.dtype) -> None:
    """Give the layers of a text model the rotary embedding that its config means.

    Args:
        model: vLLM's model.
        config: of the text part.
        dtype: that the model computes in.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") != "longrope":
        return
    made: FactoredMRotaryEmbedding | None = None
    for layer in model.language_model.model.layers:
        if not hasattr(layer, "self_attn"):  # on another rank of a pipeline
            continue
        old = layer.self_attn.rotary_emb
        made = made or FactoredMRotaryEmbedding(
            rope["short_factor"],
            old.head_size,
            old.rotary_dim,
            config.max_position_embeddings,
            rope["rope_theta"],
            True,
            dtype,
            mrope_section=list(rope["mrope_section"]),
        )
        layer.self_attn.rotary_emb = made


@dataclass(frozen=True, eq=False)
class PlacedRange(PlaceholderRange):
    """Where an image lies in a prompt, with the rotary positions of its tokens, for attention.

    Attributes:
        places: int64 `[3, length]`.
    """

    places: torch.Tensor = field(default_factory=lambda: torch.empty(3, 0))

    @classmethod
    def of(cls, old: PlaceholderRange, positions: torch.Tensor) -> PlacedRange:
        """That of `old` in a prompt whose tokens have `positions`, int64 `[3, S]`."""
        places = positions[:, old.offset : old.offset + old.length].clone()
        return cls(old.offset, old.length, old.is_embed, places)

    def extract_embeds_range(self) -> list[tuple[int, int]]:
        """First and last position of the image's tokens, `Placed`, as vLLM hands them to attention."""
        if self.is_embed is None:
            return [Placed.of(self.offset, self.offset + self.length - 1, self.places)]
        return [
            Placed.of(first, last, self.places[:, first - self.offset : last + 1 - self.offset])
            for first, last in super().extract_embeds_range()
        ]


def second_pass(
    run: Callable[..., Any], hidden: Any, positions: torch.Tensor, given: Mapping[str, torch.Tensor | None]
) -> Any:
    """Read again what stands behind the end of a prompt whose images have become latents in this very step.

    Args:
        run: vLLM's forward.
        hidden: what it has given for the step, `[tokens, width]`; written to.
        positions: of the step's tokens, `[3, tokens]` or `[tokens]`.
        given: token ids and embeddings of the step, tokens first.
    """
    context = get_forward_context()
    steps = context.attn_metadata
    step: Any = next(iter(steps.values()), None) if isinstance(steps, dict) else None
    if getattr(step, "again", None) is None:
        return hidden
    rows, again = step.again
    slots = {name: slots[rows] for name, slots in context.slot_mapping.items()}
    with override_forward_context(
        replace(context, attn_metadata=dict.fromkeys(steps, again), slot_mapping=slots)
    ):
        hidden[rows] = run(
            positions=positions[..., rows],
            **{name: None if x is None else x[rows] for name, x in given.items()},
        )
    return hidden


class _Capsight:
    """What both families have of capsight."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        """See vLLM's class; refused where capsight's attention would not be asked."""
        check_engine(vllm_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        put_right(self, vllm_config.model_config.hf_text_config, vllm_config.model_config.dtype)

    def get_mrope_input_positions(
        self, input_tokens: list[int], mm_features: list[Any]
    ) -> tuple[torch.Tensor, int]:
        """Positions of a new request; images are told theirs."""
        base: Any = super()
        positions, delta = base.get_mrope_input_positions(input_tokens, mm_features)
        for feature in mm_features:
            feature.mm_position = PlacedRange.of(feature.mm_position, positions)
        return positions, delta

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        **others: object,
    ) -> Any:
        """See vLLM's class."""
        run: Any = super().forward  # type: ignore[misc]
        hidden = run(input_ids, positions, intermediate_tensors, inputs_embeds, **others)
        return second_pass(run, hidden, positions, {"input_ids": input_ids, "inputs_embeds": inputs_embeds})


class CapsightQwen2VL(_Capsight, Qwen2VLForConditionalGeneration):
    """Qwen2-VL of an exported checkpoint."""


class CapsightQwen25VL(_Capsight, Qwen2_5_VLForConditionalGeneration):
    """Qwen2.5-VL of an exported checkpoint."""
