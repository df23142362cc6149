"""Registers the model classes of `models.py` with vLLM, without importing them."""

from __future__ import annotations

from capsight.serving.checkpoint import ARCHITECTURES, PREFIX

_CLASSES = {"qwen2_vl": "CapsightQwen2VL", "qwen2_5_vl": "CapsightQwen25VL"}


def register_models() -> None:
    """Add the architectures that exported checkpoints name; may be called again."""
    from vllm import ModelRegistry

    for kind, name in ARCHITECTURES.items():
        ModelRegistry.register_model(PREFIX + name, f"capsight.serving.vllm.models:{_CLASSES[kind]}")
