"""vLLM's own model classes under the names that exported checkpoints ask for.

What vLLM cannot say in a config is put right here: rotary frequencies of the type "longrope" together with
M-RoPE, of which vLLM makes an embedding without M-RoPE.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from vllm.model_executor.layers.rotary_embedding import MRotaryEmbedding
from vllm.model_executor.models.qwen2_5_vl import Qwen2_5_VLForConditionalGeneration
from vllm.model_executor.models.qwen2_vl import Qwen2VLForConditionalGeneration

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


class CapsightQwen2VL(Qwen2VLForConditionalGeneration):
    """Qwen2-VL of an exported checkpoint."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        """See vLLM's class; refused where capsight's attention would not be asked."""
        check_engine(vllm_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        put_right(self, vllm_config.model_config.hf_text_config, vllm_config.model_config.dtype)


class CapsightQwen25VL(Qwen2_5_VLForConditionalGeneration):
    """Qwen2.5-VL of an exported checkpoint."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        """See vLLM's class; refused where capsight's attention would not be asked."""
        check_engine(vllm_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        put_right(self, vllm_config.model_config.hf_text_config, vllm_config.model_config.dtype)
