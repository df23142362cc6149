"""vLLM's CPU attention with capsules in its paged memory and head maps in its prefill.

What happens in a step, layer by layer (`CapsightImpl.forward`):

1. vLLM writes the step's keys and values to its blocks.
2. Its own kernel computes attention: of requests that are still being read over all tokens, of those that
   have been read over a shortened block table and length (`CapsuleSteps`), of which it knows nothing.
3. With a head map, `SparsePrefill.attend` overwrites the output of image tokens; everything before them is
   still exact in paged memory then.
4. What is read to its end in this step shrinks, and tokens behind the prompt's end, which only a request that
   was preempted reads in the same step, are computed again over what is left.

With no entry `capsight` in the model's config the classes do what vLLM's do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)

from capsight.blindsight import HeadMap
from capsight.serving.checkpoint import Served
from capsight.serving.vllm.blindsight import SparsePrefill, SparseRequest, sparse_requests
from capsight.serving.vllm.paged import check_readable
from capsight.serving.vllm.settings import check_engine, served_by


@dataclass
class CapsightMetadata(CPUAttentionMetadata):
    """A step of vLLM's kernel, and what is done besides.

    Attributes:
        sparse: requests whose image tokens are read in this step, with a head map.
    """

    sparse: tuple[SparseRequest, ...] = ()


class CapsightBuilder(CPUAttentionMetadataBuilder):
    """Plans each step once for all layers."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        """Take what vLLM's builder takes."""
        super().__init__(*arguments, **options)
        self.served = served_by(self.vllm_config)
        if self.served is not None:
            check_readable(self.isa)

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Any:
        """The step's metadata."""
        made = super().build(common_prefix_len, common_attn_metadata, fast_build)
        if self.served is None:
            return made
        sparse = () if self.served.head_map is None else sparse_requests(common_attn_metadata)
        return CapsightMetadata(**vars(made), sparse=sparse)


class CapsightImpl(CPUAttentionBackendImpl):
    """Attention of one layer."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        """Take what vLLM's takes, and read what the engine is told of capsight.

        Raises:
            UnsupportedModelError: an option of the engine is in the way.
        """
        super().__init__(*arguments, **options)
        config = get_current_vllm_config()
        served = served_by(config)
        self.prefill: SparsePrefill | None = None
        if served is not None:
            check_engine(config)
            self.prefill = _prefill(config.model_config.model, served)

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Any,
        output: Tensor,
        *others: Any,
        **options: Any,
    ) -> Tensor:
        """Attention of all requests of a step; see the module."""
        found: Tensor = super().forward(
            layer, query, key, value, kv_cache, attn_metadata, output, *others, **options
        )
        if not isinstance(attn_metadata, CapsightMetadata):
            return found
        if self.prefill is not None and attn_metadata.sparse:
            index = extract_layer_index(layer.layer_name)
            self.prefill.attend(index, attn_metadata.sparse, query, kv_cache, self.scale, output)
        return found


class CapsightBackend(CPUAttentionBackend):
    """What vLLM finds under the name of its CPU backend."""

    @staticmethod
    def get_impl_cls() -> type[CPUAttentionBackendImpl]:
        """The attention."""
        return CapsightImpl

    @staticmethod
    def get_builder_cls() -> type[CPUAttentionMetadataBuilder]:
        """What plans a step."""
        return CapsightBuilder


_PREFILLS: dict[tuple[str, str, int, int], SparsePrefill] = {}


def _prefill(folder: str, served: Served) -> SparsePrefill | None:
    """The head map of this process, read once for all layers."""
    if served.head_map is None:
        return None
    rank, size = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
    key = (folder, served.head_map, rank, size)
    if key not in _PREFILLS:
        head_map = HeadMap.from_pretrained(folder, subfolder=served.head_map)
        _PREFILLS[key] = SparsePrefill(head_map, rank, size)
    return _PREFILLS[key]
