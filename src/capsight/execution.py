"""Where a model takes its inputs, whether it is whole, what autocast must not round, and fast bfloat16."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.nn import Module

from capsight.errors import UnsupportedModelError


def inputs_device(model: Any) -> torch.device:
    """The device that takes a model's inputs: its own, or where accelerate runs offloaded weights."""
    return _runs_on(model, model.device)


def module_device(module: Any) -> torch.device:
    """The device that a module of a model runs on: its weights', or where accelerate runs offloaded ones."""
    return _runs_on(module, next(module.parameters()).device)


def _runs_on(module: Any, device: torch.device) -> torch.device:
    if device.type != "meta":
        return device
    hooks = (getattr(part, "_hf_hook", None) for part in module.modules())
    devices = (getattr(hook, "execution_device", None) for hook in hooks)
    return torch.device(next((d for d in devices if d is not None), "cpu"))


def check_whole(model: Any) -> None:
    """Refuse what is no model that generates, or one of which this process holds a part only (`tp_plan`), or
    that adds tokens to its prompts.

    Raises:
        UnsupportedModelError: it is one.
    """
    check_generates(model)
    _check_prompts(model)
    distributed = getattr(model.config, "distributed_config", None)
    sizes = [getattr(model, "tp_size", None)]
    sizes += [getattr(distributed, f"{kind}_size", None) for kind in ("tp", "pp", "fsdp")]
    if any((size or 1) > 1 for size in sizes):
        raise UnsupportedModelError(
            "each process holds only a part of this model (tensor parallelism or other sharding); load it "
            "whole, on one device or spread by device_map"
        )


def check_generates(model: Any) -> None:
    """Refuse what is no transformers model with a language head.

    Raises:
        UnsupportedModelError: it is something else, also a model inside a wrapper that hides it.
    """
    kind = type(model).__name__ if isinstance(model, Module) else f"{model!r:.60}"
    if getattr(model, "config", None) is None or not hasattr(model, "get_decoder"):
        inside = "; pass its .module" if isinstance(getattr(model, "module", None), Module) else ""
        raise UnsupportedModelError(f"{kind} is no transformers vision-language model{inside}")
    if not hasattr(model, "generate"):
        raise UnsupportedModelError(
            f"{kind} is a part of a transformers model, without the language head; pass the whole model, "
            "the one that has generate"
        )


def _check_prompts(model: Any) -> None:
    """Refuse what PEFT calls prompt learning: prompt tuning, prefix tuning and kin."""
    told = getattr(model, "peft_config", None)
    told = told.values() if isinstance(told, Mapping) else ()
    if any(getattr(adapter, "is_prompt_learning", False) for adapter in told):
        raise UnsupportedModelError(
            "this model's adapter puts virtual tokens before every prompt (prompt tuning, prefix tuning), "
            "where no layout has them; use an adapter of its layers, such as LoRA"
        )


def own_precision(device: torch.device) -> AbstractContextManager[object]:
    """A context without autocast on this device: what is fitted, stored and rebuilt keeps its precision."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def processor() -> str:
    """What the CPU is called, and that it has AMX, which speeds depend on."""
    told = Path("/proc/cpuinfo")
    lines = told.read_text().splitlines() if told.exists() else []
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "")
    return (name or platform.processor() or platform.machine()) + (" (AMX)" if has_amx() else "")


def has_amx() -> bool:
    """Whether the CPU has AMX: matrix products in bfloat16 are then several times faster than in float32.

    Not where torch is told to use less of it (`ATEN_CPU_CAPABILITY=avx2`).
    """
    return _has("_is_amx_tile_supported")


def has_avx512_bf16() -> bool:
    """Whether the CPU has AVX512_BF16, which adds up products of bfloat16 two by two; likewise."""
    return _has("_is_avx512_bf16_supported")


def _has(name: str) -> bool:
    told = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return told and bool(getattr(torch.cpu, name, lambda: False)())
