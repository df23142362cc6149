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

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm import _custom_ops as ops
from vllm.config import get_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)
from vllm.v1.kv_cache_interface import FullAttentionSpec

from capsight.blindsight import HeadMap
from capsight.serving.checkpoint import Served
from capsight.serving.select import select_tokens
from capsight.serving.vllm.blindsight import SparsePrefill, SparseRequest, dense_rest, sparse_requests
from capsight.serving.vllm.paged import check_readable, read_tokens
from capsight.serving.vllm.settings import check_engine, served_by
from capsight.serving.vllm.spec import CapsuleSpec
from capsight.serving.vllm.steps import Shrinking, shortened, shrink_step


@dataclass
class CapsightMetadata(CPUAttentionMetadata):
    """A step of vLLM's kernel, and what is done besides.

    Attributes:
        sparse: requests whose image tokens are read in this step, with a head map.
        rest_rows: int64 `[n]`, the rows of all other tokens, where there are such requests.
        rest: those rows as a step of their own; None if there are none.
        shrinking: requests that are read to their prompt's end in this step.
        tail_rows: int64 `[n]`, the rows behind those prompts' ends; None if there are none.
        tails: those rows as a step of their own, over what is left of the images.
    """

    sparse: tuple[SparseRequest, ...] = ()
    rest_rows: Tensor | None = None
    rest: CPUAttentionMetadata | None = None
    shrinking: tuple[Shrinking, ...] = ()
    tail_rows: Tensor | None = None
    tails: CPUAttentionMetadata | None = None


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
        step = common_attn_metadata
        if self.served is None:
            return super().build(common_prefix_len, step, fast_build)
        sparse = () if self.served.head_map is None else sparse_requests(step)
        shrinking: tuple[Shrinking, ...] = ()
        if self.served.retained is not None:
            prompts = step.rswa_prefix_lens.tolist()
            tables, lengths, shrinking = shrink_step(step, prompts, self.block_size, self.served.retained)
            step = replace(step, block_table_tensor=tables, seq_lens=lengths)
        made = CapsightMetadata(**vars(super().build(common_prefix_len, step, fast_build)))
        made.sparse, made.shrinking = sparse, shrinking
        if sparse:
            rest, made.rest_rows = dense_rest(step, sparse)
            made.rest = super().build(0, rest, fast_build) if len(made.rest_rows) else None
        tails = [request for request in shrinking if request.tail[0] < request.tail[1]]
        if tails:
            behind, made.tail_rows = self._behind(step, tails)
            made.tails = super().build(0, behind, fast_build)
        return made

    @staticmethod
    def _behind(step: Any, tails: Sequence[Shrinking]) -> tuple[Any, Tensor]:
        """The tokens behind the prompts' ends as a step of its own, and their rows in the whole step."""
        sizes = torch.tensor([end - start for start, end in (request.tail for request in tails)])
        starts = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)]).to(torch.int32)
        rows = torch.cat([torch.arange(*request.tail) for request in tails])
        behind = replace(
            step,
            query_start_loc=starts,
            query_start_loc_cpu=starts,
            seq_lens=torch.tensor([r.length - r.plan.freed_tokens for r in tails], dtype=torch.int32),
            num_reqs=len(tails),
            num_actual_tokens=len(rows),
            max_query_len=int(sizes.max()),
            block_table_tensor=torch.stack([shortened(request.table, request.plan) for request in tails]),
            slot_mapping=step.slot_mapping[rows],
        )
        return behind, rows


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
        CapsightBackend.retained = None if served is None or served.retained == 1 else served.retained
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
        step, given = attn_metadata, (layer, query, key, value, kv_cache)
        ours = isinstance(step, CapsightMetadata)
        index = extract_layer_index(layer.layer_name) if ours else 0
        if ours and self.prefill is not None and step.sparse and not self.prefill.is_dense(index):
            if step.rest is not None:
                self._rows(given, step.rest_rows, step.rest, output)
            self.prefill.attend(index, step.sparse, query, kv_cache, self.scale, output)
        else:
            super().forward(*given, step, output, *others, **options)
        if not ours:
            return output
        for request in step.shrinking:
            self._shrink(layer, kv_cache, request)
        if step.tails is not None:
            self._rows(given, step.tail_rows, step.tails, output)
        return output

    def _rows(self, given: tuple[Any, ...], rows: Tensor, step: CPUAttentionMetadata, output: Tensor) -> None:
        """Dense attention of some rows, as a step of their own."""
        layer, query, key, value, kv_cache = given
        attended = torch.empty_like(query[rows])
        super().forward(layer, query[rows], key, value, kv_cache, step, attended)
        output.view(query.shape)[rows] = attended

    def _shrink(self, layer: Any, kv_cache: Tensor, request: Shrinking) -> None:
        """Write what each head keeps of a request's region to the region's last blocks."""
        plan = request.plan
        keys, values = read_tokens(kv_cache, request.region, plan.tokens)  # [H, T, D]
        shown = torch.cat([torch.arange(*span) for span in plan.images])
        chosen = shown[select_tokens(keys[:, shown], values[:, shown], plan.kept_image_tokens, plan.sizes)]
        keep = torch.ones(keys.shape[:2], dtype=torch.bool).index_fill_(1, shown, False)
        positions = keep.scatter_(1, chosen, True).nonzero()[:, 1].view(len(keys), -1, 1)  # [H, S, 1]
        slots = request.region[-plan.kept_blocks :, None] * plan.block_size + torch.arange(plan.block_size)
        blocks, heads, size, _ = kv_cache.shape
        ops.cpu_attn_reshape_and_cache(
            *(torch.take_along_dim(x, positions, 1).transpose(0, 1).contiguous() for x in (keys, values)),
            *kv_cache.view(blocks, heads, size * 2, -1).chunk(2, dim=2),
            slots.flatten(),
            layer.isa,
            k_scale=layer._k_scale_float,
            v_scale=layer._v_scale_float,
            kv_cache_dtype=self.kv_cache_dtype,
        )


class CapsightBackend(CPUAttentionBackend):
    """What vLLM finds under the name of its CPU backend.

    Attributes:
        retained: of the model that was built last in this process; vLLM asks a class for the kind of KV
            cache, and tells it nothing of the model.
    """

    retained: ClassVar[float | None] = None

    @classmethod
    def customize_spec(cls, spec: Any) -> Any:
        """The KV cache of a layer, with capsules where the model's config asks for them."""
        if cls.retained is None or type(spec) is not FullAttentionSpec:
            return spec
        return CapsuleSpec.of(spec, cls.retained)

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
