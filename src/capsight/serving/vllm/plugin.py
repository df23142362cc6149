"""The entry point of group `vllm.general_plugins`: vLLM calls `register` in each of its processes.

Nothing changes for models whose config says nothing of capsight.
"""

from __future__ import annotations

import logging

from capsight.serving.checkpoint import ARCHITECTURES, PREFIX
from capsight.serving.vllm.settings import missing_api

BACKEND = "capsight.serving.vllm.backend.CapsightBackend"
_MODELS = {"qwen2_vl": "CapsightQwen2VL", "qwen2_5_vl": "CapsightQwen25VL"}
"""Classes of `models.py`, which vLLM imports when it needs them."""

logger = logging.getLogger(__name__)


def register() -> None:
    """Make vLLM's CPU backend ours and add the architectures of exported checkpoints; may be called again.

    With a vLLM that the plugin does not know, it says so and leaves everything as it is: exported checkpoints
    are then models of an unknown architecture, and all others run.
    """
    problem = missing_api()
    if problem is not None:
        logger.warning("%s; exported checkpoints cannot be served", problem)
        return
    from vllm import ModelRegistry
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    for kind, name in ARCHITECTURES.items():
        ModelRegistry.register_model(PREFIX + name, f"capsight.serving.vllm.models:{_MODELS[kind]}")
    register_backend(AttentionBackendEnum.CPU_ATTN, BACKEND)
