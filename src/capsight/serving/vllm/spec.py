"""The kind of KV cache that capsules live in: ordinary blocks, with a manager of its own.

Importing the module registers it, also where a process only unpickles a spec.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Self

from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from capsight.serving.plan import Latents, Slots
from capsight.serving.vllm.manager import CapsuleManager


@dataclass(frozen=True, kw_only=True)
class CapsuleSpec(FullAttentionSpec):
    """Blocks of full attention, of which images keep a part.

    Attributes:
        capsules: what images become, and how many blocks that takes.
    """

    capsules: Slots | Latents

    @classmethod
    def of(cls, spec: FullAttentionSpec, capsules: Slots | Latents) -> CapsuleSpec:
        """A spec with all that another says."""
        return cls(**{field.name: getattr(spec, field.name) for field in fields(spec)}, capsules=capsules)

    @classmethod
    def merge(cls, specs: list[Any]) -> Self:
        """The spec of a group of layers, which all have the same."""
        if any(spec != specs[0] for spec in specs):
            raise ValueError("layers with capsules differ in their KV cache; capsight needs them alike")
        first: Self = specs[0]
        return first


KVCacheSpecRegistry._ensure_registered()  # or registering ours would hide vLLM's own
KVCacheSpecRegistry.register(CapsuleSpec, CapsuleManager, FullAttentionSpec)
